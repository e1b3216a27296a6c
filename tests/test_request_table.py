"""The table of requests: each is queued, runs and ends once, within the credit, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

import pytest

from support.echo import NO_ADAPTER
from zsl.errors import CancelledByClientError, MalformedError, OverloadedError
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.requests.credit import Credit
from zsl.trunk.requests.reply_cache import ReplyCache
from zsl.trunk.requests.request_table import (
    MAX_RETRY_MS,
    MIN_RETRY_MS,
    Request,
    RequestState,
    RequestStats,
    RequestTable,
)
from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.scheduling.scheduler import Scheduler
from zsl.trunk.sessions.adapter_store import AdapterStore
from zsl.trunk.sessions.cache_store import CacheStore
from zsl.trunk.sessions.sessions import Session, Sessions
from zsl.trunk.work import Alone, Done, Held, Keep, Kind, Shape
from zsl.wire.messages import Backward, Forward, TensorDescriptor

NONE = RequestStats()


@dataclass
class Kept:
    nbytes: int = 10
    keep: Keep = Keep.INPUT
    dropped: int = 0

    def demoted(self) -> None:
        return None

    def drop(self) -> None:
        self.dropped += 1


@dataclass
class Room:
    """A table with a credit of 2 requests and 100 bytes a session, 150 bytes for all."""

    sessions: Sessions
    table: RequestTable
    ids: Callable[[], int] = field(default_factory=lambda: count(1).__next__)

    def request(
        self,
        session: Session,
        *,
        nbytes: int = 1,
        cost_seconds: float = 0.01,
        deadline: float = 1e9,
        step: int | None = None,
    ) -> Request:
        """A forward, or the backward of a step that is held."""
        number = self.ids()
        common = {
            "session": session.id,
            "epoch": bytes(16),
            "request": number,
            "attempt": 0,
            "budget_ms": 1,
            "tensors": [TensorDescriptor(role="activations", dtype="u8", shape=(nbytes,), nbytes=nbytes)],
        }
        kind = Kind.FORWARD if step is None else Kind.BACKWARD
        header: Forward | Backward = Forward(
            **common,  # type: ignore[arg-type]
            adapter=None,
            keep=True,
            reveal=[],
            cache=None,
        )
        if step is not None:
            header = Backward(**common, **NO_ADAPTER, step=step)
        job = Job((session.id, number), session.owner, kind, 1, None, cost_seconds, deadline, session.id)
        held = None if step is None else session.held[step]
        return Request(session, header, kind, {}, Shape(1, 1, (1,)), Alone(), step is None, held, 0.0, nbytes, job)

    def add(self, session: Session, *, unsent: int = 0, nbytes: int = 1, cost_seconds: float = 0.01) -> Request:
        request = self.request(session, nbytes=nbytes, cost_seconds=cost_seconds)
        self.table.add(request, 0.0, unsent=lambda _: unsent)
        return request

    def finish(self, request: Request, stash: Kept) -> None:
        """Run a request to its answer."""
        done = Done({}, stash)
        self.table.settle(request, done)
        self.table.end(request, done, [b"answer"])

    def close(self, session: Session) -> None:
        self.sessions.close(session.id)
        self.table.close(session)


@pytest.fixture
def room() -> Room:
    ids = count()
    sessions = Sessions(
        lease_seconds=60, max_sessions=10, stash_memory_bytes=1000, new_id=lambda: next(ids).to_bytes(16, "big")
    )
    credit = Credit(max_requests=2, max_bytes=100, max_all_bytes=150)
    stores = AdapterStore(100), CacheStore(100)
    table = RequestTable(sessions, *stores, Scheduler(max_batch_tokens=100), ReplyCache(1 << 20), credit)
    return Room(sessions, table)


def tenant(name: str, max_inflight_bytes: int, weight: float = 1.0) -> Tenant:
    return Tenant(name, name.ljust(40, "0"), weight, 10, max_inflight_bytes, None)


def test_a_request_is_queued_runs_and_is_answered(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    request = room.add(session)
    assert (request.state, room.table.inflight(session)) == (RequestState.QUEUED, 1)
    assert room.table.repeated(session, request.header, [b"?"]) == (), "its one answer will serve"
    assert "1 queued, 0 running" in repr(room.table)
    assert room.table.take_batch(0.0) == [request]
    assert request.state is RequestState.RUNNING
    assert "0 queued, 1 running" in repr(room.table)
    stash = Kept()
    room.finish(request, stash)
    assert (request.state, room.table.inflight(session)) == (RequestState.ANSWERED, 0)
    assert session.held[request.header.request].stash is stash
    assert room.table.repeated(session, request.header, [b"?"]) == [b"answer"]
    assert room.table.stats == RequestStats(replies=1)
    room.close(session)
    assert (room.table.stats, stash.dropped) == (NONE, 1)


def test_an_answer_that_was_given_up_is_computed_again_unless_an_echo_asks(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    request = room.add(session)
    assert room.table.repeated(session, room.request(session).header, [b"?"]) is None, "it is new"
    (running,) = room.table.take_batch(0.0)
    room.table.end(running, Done({}), [b"answer"])
    room.table.release(session, request.header.request)
    assert room.table.repeated(session, request.header, [b"?"]) == ()
    again = request.header.model_copy(update={"attempt": 1})
    assert room.table.repeated(session, again, [b"?"]) is None
    with pytest.raises(MalformedError):
        room.table.repeated(session, request.header.model_copy(update={"keep": False}), [b"?"])


def test_a_queued_request_that_is_cancelled_does_not_run(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    stash = Kept()
    room.sessions.hold(session, 7, Held(stash, Shape(1, 1, (1,)), Alone()))
    request = room.request(session, step=7)
    room.table.add(request, 0.0)
    assert 7 not in session.held
    room.table.end(request, CancelledByClientError())
    assert (request.state, stash.dropped, room.table.take_batch(0.0)) == (RequestState.ANSWERED, 1, [])
    assert room.table.stats == NONE
    assert room.table.repeated(session, request.header, [b"?"]) is None, "an error is not kept"


def test_a_backward_that_brings_everything_ends_its_step(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    forward, stash = room.add(session), Kept()
    room.finish(forward, stash)
    backward = room.request(session, step=forward.header.request)
    backward.held = None
    room.table.add(backward, 0.0)
    assert (session.held, stash.dropped, room.table.stats.replies) == ({}, 1, 0)


def test_a_tenant_of_greater_weight_goes_first(room: Room) -> None:
    bob, alice = (
        room.sessions.open(name, now=0.0, tenant=tenant(name.decode(), 100, weight))
        for name, weight in ((b"bob", 1.0), (b"alice", 2.0))
    )
    for first in (True, False):
        requests = [room.add(bob), room.add(alice)]
        if first:
            for _ in requests:
                room.table.take_batch(0.0)
    assert room.table.take_batch(0.0) == [requests[1]]


def test_requests_whose_deadline_has_passed_are_found_once(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    late, other = room.request(session, deadline=5.0), room.request(session)
    for request in (late, other):
        room.table.add(request, 0.0)
    assert room.table.expired(4.9) == []
    assert room.table.expired(5.0) == [late]
    room.table.end(late, CancelledByClientError())
    assert (room.table.expired(6.0), room.table.take_batch(6.0)) == ([], [other])


@pytest.mark.parametrize("runs", [False, True])
def test_a_closed_session_abandons_its_requests(room: Room, runs: bool) -> None:
    session, other = (room.sessions.open(peer, now=0.0) for peer in (b"peer", b"other"))
    of_step = Kept()
    room.sessions.hold(session, 7, Held(of_step, Shape(1, 1, (1,)), Alone()))
    request = room.request(session, nbytes=100, step=7)
    room.table.add(request, 0.0)
    remaining = room.add(other)
    if runs:
        assert room.table.take_batch(0.0) == [request]
    room.close(session)
    assert request.state is RequestState.ABANDONED
    assert (room.table.stats, of_step.dropped) == (RequestStats(queued=1), 0 if runs else 1)
    room.add(other, nbytes=99)  # within the credit of all: nothing counts any more for who has gone
    stash = Kept()
    if runs:
        room.finish(request, stash)
        assert (request.state, stash.dropped, room.sessions.held_bytes) == (RequestState.ABANDONED, 1, 0)
        assert room.table.stats.replies == 0
    assert room.table.take_batch(0.0) == [remaining]


def test_a_session_that_is_closed_or_releases_the_step_between_pass_and_answer_leaves_nothing_behind(
    room: Room,
) -> None:
    gone, releasing = (room.sessions.open(peer, now=0.0) for peer in (b"gone", b"releasing"))
    requests = [room.add(gone), room.add(releasing)]
    done = [Done({}, Kept()) for _ in requests]
    for request, outcome in zip(requests, done, strict=True):
        room.table.take_batch(0.0)
        room.table.settle(request, outcome)
    assert room.sessions.held_bytes > 0
    room.close(gone)
    room.table.release(releasing, requests[1].header.request)
    for request, outcome in zip(requests, done, strict=True):
        room.table.end(request, outcome, [b"answer"])
    assert [outcome.stash.dropped for outcome in done if isinstance(outcome.stash, Kept)] == [1, 1]
    assert (room.sessions.held_bytes, room.table.stats) == (0, RequestStats(replies=1))


def test_what_a_backward_took_over_counts_until_it_has_run(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    stash = Kept()
    room.sessions.hold(session, 7, Held(stash, Shape(1, 1, (1,)), Alone()))
    request = room.request(session, step=7)
    request.job = replace(request.job, frees_graph=True)
    room.table.add(request, 0.0)
    assert room.table.taken_bytes == room.table.taken_graph_bytes == stash.nbytes > 0
    room.table.take_batch(0.0)
    room.table.settle(request, Done({}))
    assert room.table.taken_bytes == room.table.taken_graph_bytes == 0
    room.table.end(request, Done({}), [b"answer"])
    assert room.table.taken_bytes == room.table.taken_graph_bytes == 0
    assert stash.dropped == 0, "the pass has used it"


def test_bytes_over_what_all_sessions_may_have_in_flight_are_refused(room: Room) -> None:
    one, two = room.sessions.open(b"one", now=0.0), room.sessions.open(b"two", now=0.0)
    room.add(one, nbytes=100, cost_seconds=0.123)
    with pytest.raises(OverloadedError, match="all sessions") as caught:
        room.add(two, nbytes=60)
    assert caught.value.retry_after_ms == 123
    room.close(one)
    room.add(two, nbytes=60)


@pytest.mark.parametrize("runs", [False, True])
def test_a_step_that_is_released_while_it_is_in_flight_is_not_held(room: Room, runs: bool) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    request = room.add(session)
    if runs:
        room.table.take_batch(0.0)
    room.table.release(session, request.header.request)
    assert (room.table.stats.released, request.state) == (1, RequestState.RUNNING if runs else RequestState.QUEUED)
    room.table.take_batch(0.0)
    stash = Kept()
    room.finish(request, stash)
    assert (session.held, stash.dropped, room.table.stats.released) == ({}, 1, 0)
    assert room.table.repeated(session, request.header, [b"?"]) == [b"answer"]


@pytest.mark.parametrize(("cost_seconds", "retry_after_ms"), [(1e-5, MIN_RETRY_MS), (60.0, MAX_RETRY_MS)])
def test_requests_over_the_credit_are_refused_with_a_time_to_come_back(
    room: Room, cost_seconds: float, retry_after_ms: int
) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    first, _ = (room.add(session, nbytes=10, cost_seconds=cost_seconds) for _ in range(2))
    with pytest.raises(OverloadedError) as caught:
        room.add(session, nbytes=10)
    assert caught.value.retry_after_ms == retry_after_ms
    room.table.end(first, CancelledByClientError())
    room.add(session, nbytes=10)


def test_bytes_over_the_credit_are_refused_but_one_large_request_goes(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    room.add(session, nbytes=1000)
    with pytest.raises(OverloadedError):
        room.add(session, nbytes=1)


def test_bytes_over_what_a_tenant_may_have_in_flight_in_all_its_sessions_are_refused(room: Room) -> None:
    alice = tenant("alice", max_inflight_bytes=100)
    one, two = (room.sessions.open(peer, now=0.0, tenant=alice) for peer in (b"1", b"2"))
    room.add(one, nbytes=80)
    with pytest.raises(OverloadedError, match="tenant alice"):
        room.add(two, nbytes=30)
    room.add(room.sessions.open(b"3", now=0.0, tenant=tenant("bob", 100)), nbytes=30)


def test_answers_that_are_not_read_count_as_in_flight(room: Room) -> None:
    session = room.sessions.open(b"peer", now=0.0)
    with pytest.raises(OverloadedError, match="unread"):
        room.add(session, nbytes=10, unsent=95)
    room.add(session, nbytes=10, unsent=80)
    with pytest.raises(OverloadedError, match="all sessions"):
        room.table.add(room.request(session), 0.0, all_unsent=140)
