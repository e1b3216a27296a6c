"""Sessions are leases: they end, and with them everything that was kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import QuotaError, UnknownSessionError
from zsl.files.free_memory import free_bytes
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.sessions.sessions import LEAST_TURNS, Sessions
from zsl.trunk.stash_memory import default_graph_memory, default_stash_memory
from zsl.trunk.work import Alone, Held, Keep, Shape


@dataclass(frozen=True)
class Kept:
    nbytes: int
    keep: Keep = Keep.INPUT

    def demoted(self) -> Kept | None:
        if self.keep is Keep.INPUT:
            return None
        return Kept(self.nbytes // 2, Keep.LINEAR_OUTPUTS if self.keep is Keep.GRAPH_AND_LINEAR_OUTPUTS else Keep.INPUT)

    def drop(self) -> None:
        pass


def table(**changes: float) -> Sessions:
    ids = count()
    settings = {
        "lease_seconds": 60,
        "max_sessions": 10,
        "stash_memory_bytes": 1000,
        **changes,
    }
    return Sessions(**settings, new_id=lambda: next(ids).to_bytes(16, "big"))  # type: ignore[arg-type]


def kept(nbytes: int, keep: Keep = Keep.INPUT) -> Held:
    return Held(Kept(nbytes, keep), Shape(1, 1, (1,)), Alone())


def test_a_session_ends_with_its_lease_and_frees_what_it_held() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    sessions.hold(session, 1, kept(10))
    assert sessions.held_bytes == 10
    assert sessions.expired(now=59.9) == []
    assert sessions.expired(now=60.0) == [session]
    sessions.close(session.id)
    assert sessions.held_bytes == 0
    with pytest.raises(UnknownSessionError):
        sessions.get(session.id, b"peer", now=60.0)


def test_a_sign_of_life_renews_the_lease() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    sessions.get(session.id, b"peer", now=50.0)
    assert sessions.expired(now=100.0) == []
    assert sessions.expired(now=110.0) == [session]


def test_another_connection_cannot_use_a_session() -> None:
    sessions = table()
    session = sessions.open(b"mine", now=0.0)
    with pytest.raises(UnknownSessionError):
        sessions.get(session.id, b"theirs", now=1.0)


def test_over_the_memory_graphs_go_first_then_linear_outputs_then_the_oldest_inputs() -> None:
    sessions = table(stash_memory_bytes=100)
    one, two = sessions.open(b"one", now=0.0), sessions.open(b"two", now=0.0)
    sessions.hold(one, 1, kept(60, Keep.GRAPH_AND_LINEAR_OUTPUTS))
    sessions.hold(two, 2, kept(60, Keep.GRAPH))
    assert (one.held[1].stash, two.held[2].stash) == (Kept(30, Keep.LINEAR_OUTPUTS), Kept(60, Keep.GRAPH))
    sessions.hold(two, 3, kept(55))
    assert (one.held[1].stash, two.held[2].stash) == (Kept(15), Kept(30)), "the graph went, then the linear outputs"
    sessions.hold(two, 4, kept(90))
    assert one.held == {} and set(two.held) == {4}, "the oldest inputs went; their clients send them again"


@given(st.lists(st.tuples(st.integers(1, 90), st.sampled_from(list(Keep)[1:])), max_size=30))
def test_what_is_held_never_exceeds_the_memory(stashes: list[tuple[int, Keep]]) -> None:
    sessions = table(stash_memory_bytes=100)
    session = sessions.open(b"peer", now=0.0)
    for step, (nbytes, keep) in enumerate(stashes):
        sessions.hold(session, step, kept(nbytes, keep))
        assert sessions.held_bytes == sum(held.stash.nbytes for held in session.held.values()) <= 100
        assert step in session.held, "the newest step is held: its backward comes next"
    for step in list(session.held):
        assert sessions.take(session, step)
    assert sessions.held_bytes == 0


def test_graphs_are_refused_over_their_own_memory_but_for_the_only_one_of_one_request() -> None:
    sessions = table(stash_memory_bytes=1000)
    assert sessions.fits_graph(10**9, taken_bytes=10**9, alone=False), "without a memory of their own"
    sessions.graph_memory_of = lambda clients: 100
    one = sessions.open(b"one", now=0.0)
    sessions.hold(one, 1, kept(50))
    assert sessions.fits_graph(101, taken_bytes=0, alone=True), "inputs are no graph"
    assert not sessions.fits_graph(101, taken_bytes=0, alone=False)
    assert not sessions.fits_graph(101, taken_bytes=1, alone=True), "a backward that waits has one"
    sessions.hold(one, 2, kept(40, Keep.LINEAR_OUTPUTS))
    assert not sessions.fits_graph(61, taken_bytes=0, alone=True)
    assert sessions.fits_graph(60, taken_bytes=0, alone=False)
    assert not sessions.fits_graph(60, taken_bytes=1, alone=False)
    assert set(one.held) == {1, 2} and one.held[2].stash == Kept(40, Keep.LINEAR_OUTPUTS), "those held stay"


def test_a_graph_that_none_asks_for_while_each_client_has_two_steps_makes_room() -> None:
    sessions = table(stash_memory_bytes=1000)
    sessions.graph_memory_of = lambda clients: 100
    clients = [sessions.open(b"%d" % number, now=0.0) for number in range(LEAST_TURNS)]
    sessions.hold(clients[0], 0, kept(80, Keep.GRAPH))
    for step in range(1, 2 * len(clients) + 1):
        sessions.hold(clients[step % len(clients)], step, kept(1))
        assert not sessions.fits_graph(80, taken_bytes=0, alone=True)
    sessions.hold(clients[1], step + 1, kept(20, Keep.GRAPH))
    assert sessions.fits_graph(80, taken_bytes=0, alone=True)
    assert clients[0].held[0].stash == Kept(40) and clients[1].held[step + 1].stash.keep is Keep.GRAPH


@pytest.mark.parametrize(
    ("available", "memory"), [(None, 4 << 30), (100 << 30, 4 << 30), (2 << 30, 1 << 30), (0, 64 << 20)]
)
def test_a_daemon_may_grow_by_half_of_the_free_memory_and_not_without_bound(available: int | None, memory: int) -> None:
    assert default_stash_memory(available) == memory


@pytest.mark.parametrize(
    ("weights", "clients", "memory"), [(0, 0, 64 << 20), (10 << 30, 9, 5 << 30), (1 << 30, 32, 1 << 30)]
)
def test_graphs_may_take_half_of_the_weights_or_something_for_each_client(
    weights: int, clients: int, memory: int
) -> None:
    assert default_graph_memory(weights, clients) == memory


def test_what_a_container_has_left_is_what_is_free(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert free_bytes(tmp_path) == 5000 << 10
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000000\n")
    assert free_bytes(tmp_path) == 2000000
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 300000\ninactive_file 600000\nactive_file 1\n")
    assert free_bytes(tmp_path) == 2600000  # files that were read are given up for it


def tenant(name: str = "alice", **changes: object) -> Tenant:
    fields = {"name": name, "public_key": name.ljust(40, "0"), "weight": 1.0, "max_sessions": 2}
    fields |= {"max_inflight_bytes": 100, "max_stash_bytes": None}
    return Tenant(**{**fields, **changes})  # type: ignore[arg-type]


def test_nobody_reaches_another_tenants_session() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0, tenant=tenant("alice"))
    for other in (tenant("bob"), None):
        with pytest.raises(UnknownSessionError):
            sessions.get(session.id, b"peer", now=1.0, tenant=other)
        with pytest.raises(UnknownSessionError):
            sessions.renew(session.id, now=1.0, tenant=other)
        with pytest.raises(UnknownSessionError):
            sessions.resume(session.id, b"new", now=1.0, hello=1, tenant=other)
    assert sessions.get(session.id, b"peer", now=1.0, tenant=tenant("alice")) is session


def test_a_session_that_is_resumed_keeps_what_it_held_and_leaves_its_old_connection() -> None:
    sessions = table()
    session = sessions.open(b"old", now=0.0)
    sessions.hold(session, 1, kept(10))
    session.heartbeat = b"pulse"
    assert sessions.resume(session.id, b"new", now=59.0, hello=7, tenant=None) == (session, [b"old", b"pulse"])
    assert (sessions.of_peer(b"old"), sessions.of_peer(b"new")) == (None, session)
    assert 1 in session.held and sessions.expired(now=100.0) == []
    with pytest.raises(UnknownSessionError):
        sessions.get(session.id, b"old", now=60.0)


def test_a_tenant_with_all_its_sessions_gets_another_only_in_place_of_a_quiet_one() -> None:
    sessions = table()
    alice = tenant(max_sessions=2)
    first, second = (sessions.open(peer, now=0.0, tenant=alice) for peer in (b"1", b"2"))
    assert sessions.eviction_candidate(tenant("bob"), now=1.0) is None, "bob has his own"
    with pytest.raises(QuotaError, match="tenant alice has 2 open sessions"):
        sessions.eviction_candidate(alice, now=5.0)
    sessions.get(first.id, b"1", now=15.0, tenant=alice)
    assert sessions.eviction_candidate(alice, now=15.0) is second
    sessions.close(second.id)
    assert sessions.eviction_candidate(alice, now=15.0) is None


def test_all_sessions_together_are_bounded_and_a_tenant_cannot_push_out_another_ones() -> None:
    sessions = table(max_sessions=2)
    for number in range(2):
        sessions.open(b"%d" % number, now=0.0, tenant=tenant("alice"))
    with pytest.raises(QuotaError, match="this daemon has 2"):
        sessions.eviction_candidate(tenant("bob"), now=50.0)
    assert sessions.eviction_candidate(tenant("alice"), now=50.0) is not None


def test_what_is_kept_for_a_tenant_stays_within_its_own_memory_and_takes_nothing_from_others() -> None:
    sessions = table()
    alice = tenant(max_stash_bytes=100)
    bobs = sessions.open(b"0", now=0.0, tenant=tenant("bob"))
    one, two = (sessions.open(peer, now=0.0, tenant=alice) for peer in (b"1", b"2"))
    sessions.hold(bobs, 1, kept(500, Keep.GRAPH))
    sessions.hold(one, 1, kept(60, Keep.GRAPH))
    sessions.hold(two, 1, kept(60))
    assert (bobs.held[1].stash, one.held[1].stash) == (Kept(500, Keep.GRAPH), Kept(30))
    sessions.hold(two, 2, kept(90))
    assert (set(one.held), set(two.held)) == (set(), {2})


class CountedId(bytes):
    """A session's id that counts how often an entry of a table is looked at: each look hashes it."""

    looks = 0

    def __hash__(self) -> int:
        CountedId.looks += 1
        return super().__hash__()


class CountedKept:
    """A stash that counts how often its size is asked for."""

    keep = Keep.INPUT
    looks = 0

    @property
    def nbytes(self) -> int:
        CountedKept.looks += 1
        return 1

    def demoted(self) -> None:
        return None

    def drop(self) -> None:
        pass


@pytest.mark.parametrize("quota", [None, 10])
def test_to_hold_a_step_looks_at_no_more_entries_where_more_is_held(quota: int | None) -> None:
    def looks(already_held: int) -> int:
        new_id = partial(CountedId, b"i" * 16)
        sessions = Sessions(lease_seconds=60, max_sessions=100, stash_memory_bytes=already_held, new_id=new_id)
        alice = tenant(max_stash_bytes=already_held if quota is None else already_held + quota)
        session = sessions.open(b"peer", now=0.0, tenant=alice)

        def hold(steps: range) -> None:
            for step in steps:
                sessions.hold(session, step, Held(CountedKept(), Shape(1, 1, (1,)), Alone()))
                if step % 3 == 0:
                    sessions.release(session, step)

        hold(range(2 * already_held))
        CountedId.looks = CountedKept.looks = 0
        hold(range(2 * already_held, 2 * already_held + 300))
        return CountedId.looks + CountedKept.looks

    assert looks(already_held=10_000) <= 2 * looks(already_held=100)


def test_what_was_released_leaves_nothing_in_the_tables() -> None:
    sessions = table(stash_memory_bytes=1000)
    session = sessions.open(b"peer", now=0.0, tenant=tenant())
    for step in range(10_000):
        sessions.hold(session, step, kept(1))
        sessions.release(session, step)
    assert (sessions.held_bytes, sessions._held._steps) == (0, {})
    assert len(sessions._held._heap) <= 100
    sessions.close(session.id)
    assert sessions._held_of == {}


def test_a_tenants_only_step_is_given_up_bit_by_bit_until_it_is_within_its_memory() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0, tenant=tenant(max_stash_bytes=10))
    sessions.hold(session, 1, kept(40, Keep.GRAPH_AND_LINEAR_OUTPUTS))
    assert session.held[1].stash == Kept(10)


def test_room_for_a_pass_is_made_before_it_by_giving_up_the_oldest() -> None:
    sessions = table(stash_memory_bytes=100)
    session = sessions.open(b"peer", now=0.0)
    for step in (1, 2):
        sessions.hold(session, step, kept(40, Keep.GRAPH))
    assert not sessions.make_room(100), "no pass keeps more than all"
    assert sessions.held_bytes == 80
    assert sessions.make_room(40)
    assert (session.held[1].stash, session.held[2].stash) == (Kept(20), Kept(40, Keep.GRAPH))
