"""Store of adapter versions: what sessions have sent, within the daemon's memory and the quotas of tenants. Pure.

A cache: a client sends a version again that is not here any more. An owner (a tenant; without keys, a session) loses a
version to another owner only if it uses at least as much memory itself, or has not used the version for
`QUIET_SECONDS`: nobody is displaced by an owner that takes more. A version that a request in the daemon runs with
stays.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from zsl.errors import AdapterError, OverloadedError, UnknownAdapterError
from zsl.trunk.adapter import AdapterVersion
from zsl.trunk.sessions.sessions import Session
from zsl.wire.adapter_layout import AdapterLayout

# A run that switches between adapters has a few versions in use; those of earlier optimizer steps are never used again.
MAX_VERSIONS_PER_SESSION = 8
QUIET_SECONDS = 60.0
RETRY_AFTER_MS = 200

_Key = tuple[bytes, bytes]  # session and version


@dataclass(slots=True)
class _Entry:
    """Memory of a version, reserved from its first piece on. `adapter` None: pieces are still missing."""

    owner: Hashable
    nbytes: int
    last_used: float
    adapter: AdapterVersion | None = None
    requests: int = 0  # in the daemon, which run with it


class AdapterStore:
    """Versions by session, of up to `memory_bytes` in total. Times are in seconds."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()  # least recently used first
        self._of_owner: Counter[Hashable] = Counter()  # bytes
        self._of_session: dict[bytes, set[bytes]] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, session: Session, version: bytes, nbytes: int, now: float) -> bool:
        """Reserve the memory of a version that begins to arrive, and forget what has come of another one.

        Returns False if it is here already. Raises `AdapterError` if it is over the quota of its tenant,
        `OverloadedError` if versions in use take the room.
        """
        for other in [one for one in self._versions(session) if self._entries[session.id, one].adapter is None]:
            self._remove((session.id, other))
        if version in self._versions(session):
            return False
        quota = self._quota(session)
        if nbytes > quota:
            raise AdapterError(f"an adapter of {nbytes} bytes is over the {quota} that are granted")
        while len(self._versions(session)) >= MAX_VERSIONS_PER_SESSION:
            self._evict_one(session, lambda key, entry: key[0] == session.id)
        while self._of_owner[session.owner] + nbytes > quota:
            self._evict_one(session, lambda key, entry: entry.owner == session.owner)
        while self.nbytes + nbytes > self._memory_bytes:
            self._evict_one(session, self._displaceable_by(session, nbytes, now))
        self._entries[session.id, version] = _Entry(session.owner, nbytes, now)
        self._of_owner[session.owner] += nbytes
        self._of_session.setdefault(session.id, set()).add(version)
        self.nbytes += nbytes
        return True

    def awaits(self, session: Session, version: bytes) -> bool:
        """Return whether a version has begun to arrive, is not complete, and has not been displaced."""
        entry = self._entries.get((session.id, version))
        return entry is not None and entry.adapter is None

    def known_layout(self, session: Session, digest: bytes) -> AdapterLayout | None:
        """Return the layout of a complete version of this session that came as bytes of this digest."""
        for version in self._versions(session):
            adapter = self._entries[session.id, version].adapter
            if adapter is not None and adapter.layout_digest == digest:
                return adapter.layout
        return None

    def complete(self, session: Session, adapter: AdapterVersion) -> None:
        """Keep a version, all of whose pieces have come."""
        self._entries[session.id, adapter.version].adapter = adapter

    def get(self, session: Session, version: bytes, now: float) -> AdapterVersion:
        """Return a complete version of this session. Raises `UnknownAdapterError`."""
        entry = self._entries.get((session.id, version))
        if entry is None or entry.adapter is None:
            raise UnknownAdapterError()
        entry.last_used = now
        self._entries.move_to_end((session.id, version))
        return entry.adapter

    def begin_request(self, session: Session, version: bytes) -> None:
        """Keep a version in the store until `end_request`."""
        self._entries[session.id, version].requests += 1

    def end_request(self, session: Session, version: bytes) -> None:
        """Let a version go again."""
        entry = self._entries.get((session.id, version))
        if entry is not None:  # else its session was closed
            entry.requests -= 1

    def drop(self, session: Session, version: bytes) -> None:
        """Forget a version."""
        if (session.id, version) in self._entries:
            self._remove((session.id, version))

    def close(self, session: Session) -> None:
        """Forget the versions of a session."""
        for version in list(self._versions(session)):
            self._remove((session.id, version))

    def _quota(self, session: Session) -> int:
        own = None if session.tenant is None else session.tenant.max_adapter_bytes
        return self._memory_bytes if own is None else min(own, self._memory_bytes)

    def _displaceable_by(self, session: Session, nbytes: int, now: float) -> Callable[[_Key, _Entry], bool]:
        """Return the condition on a version to leave for a new one of a session."""
        wanted = self._of_owner[session.owner] + nbytes

        def displaceable(key: _Key, entry: _Entry) -> bool:
            quiet = now - entry.last_used >= QUIET_SECONDS
            return quiet or entry.owner == session.owner or self._of_owner[entry.owner] >= wanted

        return displaceable

    def _evict_one(self, session: Session, allowed: Callable[[_Key, _Entry], bool]) -> None:
        """Remove the version that leaves first: of the session, of its owner, then of whoever uses most.

        Raises `OverloadedError` if all are in use.
        """
        candidates = [key for key, entry in self._entries.items() if not entry.requests and allowed(key, entry)]
        if not candidates:
            raise OverloadedError(
                "the daemon's memory for adapters is in use; its operator can give it more with --adapter-memory",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._remove(min(candidates, key=lambda key: self._rank(session, key)))  # the oldest of equal ones

    def _rank(self, session: Session, key: _Key) -> tuple[bool, bool, int]:
        owner = self._entries[key].owner
        return key[0] != session.id, owner != session.owner, -self._of_owner[owner]

    def _versions(self, session: Session) -> set[bytes]:
        return self._of_session.get(session.id, set())

    def _remove(self, key: _Key) -> None:
        entry = self._entries.pop(key)
        self.nbytes -= entry.nbytes
        self._of_owner[entry.owner] -= entry.nbytes
        if not self._of_owner[entry.owner]:
            del self._of_owner[entry.owner]
        of_session = self._of_session[key[0]]
        of_session.discard(key[1])
        if not of_session:
            del self._of_session[key[0]]
