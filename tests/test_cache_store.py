"""Keys and values stay within the memory and the quotas, and belong to one session."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import BadShapeError, MalformedError, OverloadedError, TooLargeError, UnknownCacheError, WireError
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.costs import CacheMemory
from zsl.trunk.sessions.cache_store import QUIET_SECONDS, CacheStore
from zsl.trunk.sessions.sessions import Session, Sessions
from zsl.trunk.work import CacheUse
from zsl.wire.messages import UsedCache

MEMORY = CacheMemory(((1, None),))  # a byte for each token of a row
ROOMY = CacheMemory(((1, None), (1, 6)), has_room=True)
Cache = tuple[UsedCache, tuple[int, ...] | None]  # a header's, and rows
Begun = tuple[Session, CacheUse, int, int]


def tenant(name: str, max_cache_bytes: int | None = None) -> Tenant:
    return Tenant(name, name.ljust(40, "0"), 1.0, 999, 100, None, None, max_cache_bytes)


def sessions() -> Sessions:
    ids = count(1)
    return Sessions(
        lease_seconds=60.0, max_sessions=999, stash_memory_bytes=0, new_id=lambda: next(ids).to_bytes(16, "big")
    )


class Place:
    """A store, and requests to it as their sessions make them."""

    def __init__(self, memory_bytes: int, memory: CacheMemory = MEMORY) -> None:
        self.store = CacheStore(memory_bytes)
        self._memory = memory
        self.sessions = sessions()

    def session(self, owner: Tenant | None = None) -> Session:
        return self.sessions.open(str(len(self.sessions)).encode(), 0.0, tenant=owner)

    def begin(self, session: Session, cache: Cache, rows: int = 1, tokens: int = 1, now: float = 0.0) -> Begun:
        used, kept = cache
        use = self.store.use(session, used, kept, request=used.name, rows=rows, tokens=tokens, memory=self._memory)
        self.store.begin_request(session, use, now)
        return session, use, rows, tokens

    def end(self, begun: Begun, *, failed: bool = False) -> None:
        session, use, rows, tokens = begun
        self.store.end_request(session, use, None if failed else object(), rows=rows, tokens=tokens)

    def run(self, session: Session, cache: Cache, rows: int = 1, tokens: int = 1, now: float = 0.0) -> None:
        self.end(self.begin(session, cache, rows, tokens, now))


def new(name: int) -> Cache:
    return UsedCache(name=name, version=0, length=0), None


def then(name: int, version: int, length: int, rows: tuple[int, ...] | None = None) -> Cache:
    return UsedCache(name=name, version=version, length=length), rows


def test_a_cache_is_continued_in_its_newest_version_only_and_by_its_session_only() -> None:
    place = Place(1000)
    session, other = place.session(), place.session()
    place.run(session, new(1), rows=2, tokens=5)
    assert place.store.nbytes == 10
    place.run(session, then(1, 1, 4, (1, 1, 0)), rows=3, tokens=2)
    assert place.store.nbytes == 3 * 6
    for wrong in (then(1, 1, 4), then(1, 3, 4), then(2, 2, 4)):
        with pytest.raises(UnknownCacheError):
            place.begin(session, wrong, rows=3)
    with pytest.raises(UnknownCacheError):
        place.begin(other, then(1, 2, 6), rows=3)
    place.run(session, then(1, 2, 6), rows=3)


@pytest.mark.parametrize(
    ("cache", "rows", "error"),
    [
        (then(1, 1, 6), 2, BadShapeError),
        (then(1, 1, 0), 2, BadShapeError),
        (then(1, 1, 5, (2,)), 1, BadShapeError),
        (then(1, 1, 5, (0,)), 2, BadShapeError),
        (then(1, 1, 5), 3, BadShapeError),
        (then(9, 0, 3), 1, MalformedError),
        (then(9, 0, 0, (0,)), 1, MalformedError),
    ],
)
def test_a_request_that_does_not_fit_a_cache_is_refused_and_changes_nothing(
    cache: Cache, rows: int, error: type[WireError]
) -> None:
    place = Place(1000)
    session = place.session()
    place.run(session, new(1), rows=2, tokens=5)
    with pytest.raises(error):
        place.begin(session, cache, rows=rows)
    place.run(session, then(1, 1, 5), rows=2)


def test_a_failed_request_leaves_the_cache_as_it_was_and_a_new_one_nothing() -> None:
    place = Place(1000)
    session = place.session()
    place.end(place.begin(session, new(1), tokens=5), failed=True)
    assert (place.store.nbytes, len(place.store)) == (0, 0)
    place.run(session, new(2), tokens=5)
    place.end(place.begin(session, then(2, 1, 5), tokens=3), failed=True)
    assert place.store.nbytes == 5
    place.run(session, then(2, 1, 5), tokens=3)


def test_a_cache_in_use_is_no_one_elses_and_goes_when_its_request_ends() -> None:
    place = Place(100)
    session = place.session()
    place.run(session, new(1), tokens=30)
    begun = place.begin(session, then(1, 1, 30), tokens=1)
    assert place.store.nbytes == 30 + 31, "both are there while the request runs"
    with pytest.raises(UnknownCacheError):
        place.begin(session, then(1, 1, 30), tokens=1)
    with pytest.raises(OverloadedError):
        place.begin(session, new(2), tokens=50)
    place.store.close(session)
    assert place.store.nbytes == 61
    place.end(begun)
    assert (place.store.nbytes, len(place.store)) == (0, 0)


def test_a_request_that_appends_in_the_room_of_its_cache_is_not_counted_twice() -> None:
    place = Place(100, CacheMemory(((1, None),), has_room=True))
    session = place.session()
    place.run(session, new(1), tokens=33)
    assert place.store.nbytes == 40
    for version, (tokens, rows, bytes_of_request) in enumerate([(6, None, 0), (1, None, 48), (1, (0,), 48)], start=1):
        length = (33, 39, 40)[version - 1]
        begun = place.begin(session, then(1, version, length, rows), tokens=tokens)
        assert place.store.nbytes == (40, 40, 48)[version - 1] + bytes_of_request
        place.end(begun)
    assert place.store.nbytes == 48


def test_an_owner_loses_its_own_oldest_first_and_to_others_what_is_idle_or_more_than_twice_theirs() -> None:
    place = Place(100)
    mine, other = place.session(), place.session()
    for name in (1, 2, 3):
        place.run(mine, new(name), tokens=30)
    place.run(mine, new(4), tokens=30)
    with pytest.raises(UnknownCacheError):
        place.begin(mine, then(1, 1, 30))
    with pytest.raises(OverloadedError):
        place.begin(other, new(5), tokens=60)  # 90 is not more than twice of it
    place.run(other, new(6), tokens=40)
    assert place.store.nbytes == 100 and len(place.store) == 3
    place.run(other, new(7), tokens=60, now=QUIET_SECONDS)


def test_of_two_that_need_more_the_older_goes_on_unless_it_holds_more_than_twice_as_much() -> None:
    place = Place(100)
    first, second = place.session(), place.session()
    place.run(first, new(1), tokens=30)
    place.run(second, new(2), tokens=20)
    with pytest.raises(OverloadedError):
        place.begin(second, then(2, 1, 20), tokens=40)
    place.run(first, then(1, 1, 30), tokens=40)
    with pytest.raises(UnknownCacheError):
        place.begin(second, then(2, 1, 20))
    place.run(second, new(3), tokens=20)
    place.run(second, then(3, 1, 20), tokens=10)
    with pytest.raises(UnknownCacheError):
        place.begin(first, then(1, 2, 70))


def test_a_quota_holds_for_all_sessions_of_a_tenant() -> None:
    place = Place(100)
    owner = tenant("a", max_cache_bytes=50)
    one, two = place.session(owner), place.session(owner)
    with pytest.raises(TooLargeError):
        place.begin(one, new(1), tokens=51)
    place.run(one, new(1), tokens=40)
    place.run(two, new(2), tokens=40)
    assert place.store.nbytes == 40
    place.store.drop(two, 2)
    place.store.drop(two, 2)
    assert place.store.nbytes == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),  # session
            st.integers(0, 5),  # cache, by age
            st.integers(1, 3),  # rows
            st.integers(1, 40),  # tokens
            st.sampled_from(["run", "fail", "begin", "end", "drop", "close"]),
            st.integers(0, 70),  # seconds
        ),
        max_size=60,
    ),
    st.sampled_from([MEMORY, ROOMY]),
)
def test_the_memory_and_the_quotas_are_never_exceeded(
    acts: list[tuple[int, int, int, int, str, int]], memory: CacheMemory
) -> None:
    place, now, names = Place(100, memory), 0.0, count(1)
    owners = [None, tenant("a"), tenant("a"), tenant("b", max_cache_bytes=60), None]
    everyone = [place.session(owner) for owner in owners]
    known: list[dict[int, tuple[int, int, int]]] = [{} for _ in everyone]  # version, rows, length
    running: list[tuple[int, int, Begun]] = []
    for who, which, rows, tokens, act, seconds in acts:
        now += seconds
        session, mine = everyone[who], known[who]
        if act == "close":
            place.store.close(session)
            mine.clear()
        elif act == "end" and running:
            owner, name, begun = running.pop(which % len(running))
            place.end(begun)
            if name in known[owner]:
                version, _, _ = known[owner][name]
                known[owner][name] = version + 1, begun[2], begun[1].length + begun[3]
        elif act == "drop" and mine:
            name = list(mine)[which % len(mine)]
            place.store.drop(session, name)
            del mine[name]
        elif act in ("run", "fail", "begin"):
            if which < len(mine):
                name = list(mine)[which]
                version, rows, length = mine[name]
            else:
                name, version, length = next(names), 0, 0
            try:
                begun = place.begin(session, then(name, version, length) if version else new(name), rows, tokens, now)
            except (UnknownCacheError, OverloadedError, TooLargeError):
                continue
            if act == "begin":
                running.append((who, name, begun))
                mine[name] = version, rows, length
            else:
                place.end(begun, failed=act == "fail")
                if act == "run":
                    mine[name] = version + 1, rows, length + tokens
        counted = [(entry.owner, entry.nbytes + (entry.reserved or 0)) for entry in place.store._entries.values()]
        assert place.store.nbytes == sum(nbytes for _, nbytes in counted) <= 100
        assert sum(nbytes for owner, nbytes in counted if owner == everyone[3].owner) <= 60
    for _, _, begun in running:
        place.end(begun)
    for session in everyone:
        place.store.close(session)
    assert (place.store.nbytes, len(place.store), dict(place.store._of_owner), place.store._of_session) == (
        0,
        0,
        {},
        {},
    )
