"""Table of requests: the state of each request from admission to its end.

    add → QUEUED → take_batch → RUNNING → settle, end → ANSWERED

A request can be cancelled or expire only while QUEUED; it then ends without running. A running pass is never stopped.
A request whose session closes is ABANDONED: it is not answered, and its result is dropped. A request whose step the
client releases is answered, but its stash is dropped.

The table owns the scheduler, which orders and batches queued requests, and the reply cache. Pure: no sockets, time is
an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import cast

from zsl.errors import CancelledByClientError, MalformedError, WireError
from zsl.trunk.adapter import AdapterUse
from zsl.trunk.requests.credit import Credit, InFlight
from zsl.trunk.requests.reply_cache import ReplyCache, asked_by
from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.scheduling.scheduler import Scheduler
from zsl.trunk.sessions.adapter_store import AdapterStore
from zsl.trunk.sessions.cache_store import CacheStore
from zsl.trunk.sessions.sessions import Session, Sessions
from zsl.trunk.work import Buffers, CacheUse, Held, Kind, Outcome, Shape, Sharing
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward, Reveal

MIN_RETRY_MS, MAX_RETRY_MS = 10, 5_000


class RequestState(Enum):
    """States of a request. The last two are final."""

    QUEUED = "queued"
    RUNNING = "running"
    ANSWERED = "answered"
    ABANDONED = "abandoned"


@dataclass(slots=True, eq=False)
class Request:
    """A valid request: its computation, its session, and its state. `released`: the client released its step."""

    session: Session
    header: Forward | Backward
    kind: Kind
    buffers: Buffers
    shape: Shape
    sharing: Sharing
    keep: bool
    held: Held | None
    arrived: float
    nbytes: int
    job: Job
    adapter: AdapterUse | None = None
    reveals: tuple[Reveal, ...] = ()
    cache: CacheUse | None = None
    state: RequestState = RequestState.QUEUED
    released: bool = False

    @property
    def taken_bytes(self) -> int:
        """Bytes of the held stash that this backward took over from its session."""
        return 0 if self.held is None else self.held.stash.nbytes

    @property
    def taken_graph_bytes(self) -> int:
        """Those bytes if more than inputs is kept."""
        return self.taken_bytes if self.job.frees_graph else 0

    def is_asked_by(self, header: Forward | Backward, frames: Sequence[Frame]) -> bool:
        """Return whether a message with its id is a duplicate of it, with or without activations for a backward."""
        arrived = {d.role: frame for d, frame in zip(header.tensors, frames, strict=True)}
        return asked_by(self.header) == asked_by(header) and all(
            self.buffers[role][1] == frame for role, frame in arrived.items() if role in self.buffers
        )


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Numbers of requests by state. `released` counts queued or running ones, `replies` cached answers."""

    queued: int = 0
    running: int = 0
    released: int = 0
    replies: int = 0


class RequestTable:
    """Requests of open sessions.

    `taken_bytes`: bytes of the held stashes that backwards in the table took over; `taken_graph_bytes`: of those that
    keep more than inputs. `waits_until`: the time to call
    `take_batch` again if no request arrives before; None unless it delays a queued request.
    """

    def __init__(
        self,
        sessions: Sessions,
        adapters: AdapterStore,
        caches: CacheStore,
        scheduler: Scheduler,
        replies: ReplyCache,
        credit: Credit,
    ) -> None:
        self.sessions = sessions
        self._adapters = adapters
        self._caches = caches
        self._scheduler = scheduler
        self._replies = replies
        self._credit = credit
        self._open: dict[bytes, dict[int, Request]] = {}  # queued and running, by session
        self._bytes = 0
        self.taken_bytes = self.taken_graph_bytes = 0

    def __repr__(self) -> str:
        counted = ", ".join(f"{number} {state}" for state, number in asdict(self.stats).items())
        return f"<RequestTable: {counted}>"

    @property
    def stats(self) -> RequestStats:
        """The numbers of requests by state."""
        requests = [request for of_session in self._open.values() for request in of_session.values()]
        return RequestStats(
            queued=self.queued,
            running=sum(request.state is RequestState.RUNNING for request in requests),
            released=sum(request.released for request in requests),
            replies=len(self._replies),
        )

    @property
    def queued(self) -> int:
        """Number of queued requests, in constant time."""
        return len(self._scheduler)

    @property
    def waits_until(self) -> float | None:
        return self._scheduler.waits_until

    def get(self, session: Session, request: int) -> Request | None:
        """Return a queued or running request by its id, or None."""
        return self._open.get(session.id, {}).get(request)

    def inflight(self, session: Session) -> int:
        """Return the number of unanswered requests of a session."""
        return len(self._open.get(session.id, ()))

    def repeated(self, session: Session, header: Forward | Backward, frames: Sequence[Frame]) -> Sequence[Frame] | None:
        """Return the frames to send for a duplicate request; None if it is new, or has to be computed again.

        Empty while the first delivery is unanswered: its answer is sent on the connection that is open then. Raises
        `MalformedError` if its id was used for another request.
        """
        request = self.get(session, header.request)
        if request is not None:
            if not request.is_asked_by(header, frames):
                raise MalformedError("this request id is in use for another request")
            return ()
        reply = self._replies.get(session.id, header)
        if reply is None:
            return None
        if reply.frames is not None:
            return reply.frames
        # A client that repeats a request has no answer, and counts up `attempt`; 0 is a late duplicate delivery.
        return () if header.attempt == 0 else None

    def add(
        self, request: Request, now: float, *, unsent: Callable[[bytes], int] = lambda _: 0, all_unsent: int = 0
    ) -> None:
        """Queue a request. Raises `OverloadedError` over the limits of its session, its tenant, or the total, and
        `TooLargeError` for a cache over the limit.

        `unsent` returns the bytes of unread answers of a connection, `all_unsent` is their total. Both count as in
        flight.
        """
        session, header = request.session, request.header
        inflight = InFlight(
            requests=self.inflight(session),
            session_bytes=self._bytes_of(session, unsent),
            tenant_bytes=sum(self._bytes_of(one, unsent) for one in self.sessions.of_tenant(session.tenant)),
            all_bytes=self._bytes + all_unsent,
        )
        self._credit.check(request.nbytes, inflight, session.tenant, retry_after_ms=self._retry_after_ms())
        if request.cache is not None:
            self._caches.begin_request(session, request.cache, now)
        if isinstance(header, Backward):  # a backward ends its step
            if request.held is None:
                self.sessions.release(session, header.step)
            else:
                self.sessions.take(session, header.step)
            self._replies.give_up(session.id, header.step)
        if request.adapter is not None:
            self._adapters.begin_request(session, request.adapter.version.version)
        self._open.setdefault(session.id, {})[header.request] = request
        self._bytes += request.nbytes
        self.taken_bytes += request.taken_bytes
        self.taken_graph_bytes += request.taken_graph_bytes
        self._scheduler.add(request.job, now, weight=1.0 if session.tenant is None else session.tenant.weight)

    def take_batch(self, now: float) -> list[Request]:
        """Start the requests of the next pass, all of one kind. Empty if none is queued, or while it is delayed."""
        most = self.sessions.graph_memory_bytes
        # By their used time all clients would run a forward before the first backward, and hold a graph each.
        crowded = most is not None and self.taken_graph_bytes > most // 2
        batch = [self._request_of(job) for job in self._scheduler.take_batch(now, frees_graphs=crowded)]
        for request in batch:
            request.state = RequestState.RUNNING
        return batch

    def charge(self, batch: Sequence[Request], seconds: float, now: float) -> None:
        """Charge the tenants of a batch for its measured seconds."""
        self._scheduler.charge([request.job for request in batch], seconds, now)

    def expired(self, now: float) -> list[Request]:
        """Return the queued requests past their deadline. The caller has to end them."""
        return [self._request_of(job) for job in self._scheduler.take_expired(now)]

    def settle(self, request: Request, outcome: Outcome) -> None:
        """Hold the stash that a request has made, and forget the one that it took.

        Call it before the next pass, for which there has to be room, and `end` later.
        """
        self._drop_taken(request, outcome)
        if isinstance(outcome, WireError) or outcome.stash is None:
            return
        if request.released or request.state is RequestState.ABANDONED:
            outcome.stash.drop()
        else:
            held = Held(outcome.stash, request.shape, request.sharing, request.header.adapter, request.reveals)
            self.sessions.hold(request.session, request.header.request, held)

    def end(self, request: Request, outcome: Outcome, answer: Sequence[Frame] = ()) -> None:
        """End a request with its result or error. `answer`: the frames to cache."""
        if request.state is RequestState.QUEUED:
            self._scheduler.discard(request.job.key)
        self._drop_taken(request, outcome)
        if request.adapter is not None:
            self._adapters.end_request(request.session, request.adapter.version.version)
        if request.cache is not None:
            kept = None if isinstance(outcome, WireError) else outcome.kept
            rows, tokens = request.shape.rows, request.shape.tokens
            self._caches.end_request(request.session, request.cache, kept, rows=rows, tokens=tokens)
        if request.state is RequestState.ABANDONED:
            self._scheduler.forget_client(request.session.id)
            return
        request.state = RequestState.ANSWERED
        self._remove(request)
        if not isinstance(outcome, WireError):
            self._replies.put(request.session.id, request.header, answer)

    def release(self, session: Session, step: int) -> None:
        """Drop the stash of a step, also of a queued or running one, and the cache that it made: its client will
        request no backward, and no forward behind it."""
        self.sessions.release(session, step)
        self._caches.drop(session, step)
        request = self.get(session, step)
        if request is not None:
            request.released = True
        self._replies.give_up(session.id, step)

    def close(self, session: Session) -> None:
        """Abandon the requests of a closed session."""
        for request in list(self._open.get(session.id, {}).values()):
            self._remove(request)
            was_queued = self._scheduler.discard(request.job.key)
            request.state = RequestState.ABANDONED
            if was_queued:
                self.end(request, CancelledByClientError())
        self._caches.close(session)
        self._replies.close(session.id)
        self._scheduler.forget_client(session.id)
        if session.tenant is None:  # the used time of a tenant with a key must survive a reconnect
            self._scheduler.forget_tenant(session.id)

    def _drop_taken(self, request: Request, outcome: Outcome) -> None:
        """Forget the stash that a backward took over."""
        if request.held is None:
            return
        self.taken_bytes -= request.taken_bytes
        self.taken_graph_bytes -= request.taken_graph_bytes
        if isinstance(outcome, WireError):
            request.held.stash.drop()
        request.held = None

    def _remove(self, request: Request) -> None:
        of_session = self._open[request.session.id]
        del of_session[request.header.request]
        if not of_session:
            del self._open[request.session.id]
        self._bytes -= request.nbytes

    def _request_of(self, job: Job) -> Request:
        session, request = cast(tuple[bytes, int], job.key)
        return self._open[session][request]

    def _bytes_of(self, session: Session, unsent: Callable[[bytes], int]) -> int:
        return sum(request.nbytes for request in self._open.get(session.id, {}).values()) + unsent(session.peer)

    def _retry_after_ms(self) -> int:
        """Return the expected milliseconds until the queue is empty, within bounds."""
        return min(max(round(self._scheduler.backlog_seconds * 1000), MIN_RETRY_MS), MAX_RETRY_MS)
