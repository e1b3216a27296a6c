"""Store of caches: keys and values of the trunk's layers, within the daemon's memory and the quotas of tenants. Pure.

A client that lost a cache sends the trunk's inputs again. Memory is reserved before a request runs: that of the cache
that it makes, less the part that it shares with the one that it continues. A cache with a request in the daemon stays.
An owner (a tenant; without keys, a session) loses the others, the least recently used first, to its own requests. It
loses them to those of another owner if it has not used them for `QUIET_SECONDS`, if it holds more than twice the memory
of the other, or, else, to older caches of the other. So two that both need more memory never wait for each other, nor
take it in turn.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count

from zsl.errors import BadShapeError, MalformedError, TooLargeError, UnknownCacheError
from zsl.trunk.costs import CacheMemory
from zsl.trunk.sessions.owned_memory import Entry, OwnedMemory
from zsl.trunk.sessions.sessions import Session
from zsl.trunk.work import CacheUse
from zsl.wire.messages import UsedCache

QUIET_SECONDS = 60.0

_Key = tuple[bytes, int]  # session and name


@dataclass(slots=True)
class _Entry(Entry):
    """A cache. `born`: in order of the caches' first requests. `reserved`: bytes for the request that runs with it, if
    any. `dropped`: it goes after that request."""

    born: int = 0
    version: int = 0
    rows: int = 0
    length: int = 0
    kept: object | None = field(default=None, repr=False)
    reserved: int | None = None
    dropped: bool = False


class CacheStore(OwnedMemory[int, _Entry]):
    """Caches by session, of up to `memory_bytes` in total. Times are in seconds."""

    what, option = "keys and values", "--cache-memory"

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes)
        self._births = count()

    def use(
        self,
        session: Session,
        used: UsedCache,
        kept_rows: tuple[int, ...] | None,
        *,
        request: int,
        rows: int,
        tokens: int,
        memory: CacheMemory,
    ) -> CacheUse:
        """Return the cache that a request of `rows` x `tokens` runs with: these of its rows (None: all, in order).

        Raises `UnknownCacheError` if it is not here in this version, `MalformedError` or `BadShapeError` if the request
        does not fit it.
        """
        nbytes = memory.nbytes(rows, used.length + tokens, tokens)
        entry = self._entries.get((session.id, used.name))
        if used.version == 0:
            if used.name != request or used.length or kept_rows is not None:
                raise MalformedError("a new cache is named by its first request, and holds nothing before it")
            if entry is not None and entry.reserved is not None:
                raise UnknownCacheError()
            return CacheUse(used.name, None, 0, None, nbytes, nbytes)
        if entry is None or entry.version != used.version or entry.reserved is not None or entry.dropped:
            raise UnknownCacheError()
        if not 0 < used.length <= entry.length:
            raise BadShapeError(f"the cache holds {entry.length} tokens, {used.length} of them are asked for")
        if kept_rows is not None and max(kept_rows) >= entry.rows:
            raise BadShapeError(f"the cache has {entry.rows} rows, row {max(kept_rows)} is asked for")
        if rows != (entry.rows if kept_rows is None else len(kept_rows)):
            raise BadShapeError(f"{rows} rows of activations for a cache of {entry.rows}")
        added = nbytes
        if kept_rows is None and used.length == entry.length:
            added = memory.added_nbytes(rows, used.length + tokens, tokens)
        return CacheUse(used.name, entry.kept, used.length, kept_rows, nbytes, added)

    def begin_request(self, session: Session, use: CacheUse, now: float) -> None:
        """Reserve the memory of a request, and keep its cache until `end_request`.

        Raises `TooLargeError` if the request needs more than is granted, `OverloadedError` if others use the room.
        """
        key = session.id, use.name
        if use.kept is None:
            self.drop(session, use.name)  # a request that comes again
        held = 0 if use.kept is None else self._entries[key].nbytes
        quota = self._quota(None if session.tenant is None else session.tenant.max_cache_bytes)
        if held + use.added_nbytes > quota:
            raise TooLargeError(
                f"a cache of {use.nbytes} bytes, beside its last form of {held}, is over the {quota} that are granted: "
                "generate with fewer rows or tokens, with use_cache=False, or start the daemon with more --cache-memory"
            )
        while self._of_owner[session.owner] + use.added_nbytes > quota:
            self._evict_for(session, key, use.added_nbytes, now, of_owner_only=True)
        while self.nbytes + use.added_nbytes > self._memory_bytes:
            self._evict_for(session, key, use.added_nbytes, now, of_owner_only=False)
        if use.kept is None:
            self._add(session, use.name, _Entry(session.owner, now, born=next(self._births)))
        entry = self._entries[key]
        entry.last_used, entry.reserved = now, use.added_nbytes
        self._entries.move_to_end(key)
        self._count(entry, use.added_nbytes)

    def end_request(self, session: Session, use: CacheUse, kept: object | None, *, rows: int, tokens: int) -> None:
        """Keep what a request of `rows` x `tokens` made; with None, what there was before it."""
        key = session.id, use.name
        entry = self._entries[key]
        assert entry.reserved is not None
        self._count(entry, -entry.reserved)
        entry.reserved = None
        if kept is not None:
            self._count(entry, use.nbytes - entry.nbytes)
            entry.nbytes, entry.kept = use.nbytes, kept
            entry.version, entry.rows, entry.length = entry.version + 1, rows, use.length + tokens
        if entry.dropped or entry.kept is None:
            self._remove(key)

    def drop(self, session: Session, name: int) -> None:
        """Forget a cache, when no request runs with it any more."""
        entry = self._entries.get((session.id, name))
        if entry is None:
            return
        if entry.reserved is None:
            self._remove((session.id, name))
        else:
            entry.dropped = True

    def close(self, session: Session) -> None:
        """Forget the caches of a session."""
        for name in list(self._names(session)):
            self.drop(session, name)

    def _evict_for(self, session: Session, key: _Key, nbytes: int, now: float, *, of_owner_only: bool) -> None:
        """Remove the cache that leaves first for `nbytes` of the cache `key`. Raises `OverloadedError`."""
        mine = self._entries.get(key)

        def may_leave(other: _Key, entry: _Entry) -> bool:
            if entry.reserved is not None or other == key:
                return False
            return entry.owner == session.owner or (
                not of_owner_only and self._is_displaceable(entry, session.owner, mine, nbytes, now)
            )

        self._evict_one(session, may_leave)

    def _is_displaceable(self, entry: _Entry, owner: Hashable, mine: _Entry | None, nbytes: int, now: float) -> bool:
        """Return whether an entry leaves for a request of another owner, which continues `mine`, or makes `nbytes`."""
        ours, theirs = self._of_owner[owner] + (nbytes if mine is None else 0), self._of_owner[entry.owner]
        # Of two owners that both wait, one may displace the other.
        is_older = mine is not None and mine.born < entry.born and ours <= 2 * theirs
        return is_older or theirs > 2 * ours or now - entry.last_used >= QUIET_SECONDS
