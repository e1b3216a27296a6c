"""Store of adapter versions: what sessions have sent, within the daemon's memory and the quotas of tenants. Pure.

A cache: a client sends a version again that is not here any more. An owner (a tenant; without keys, a session) loses a
version to another owner only if it uses at least as much memory itself, or has not used the version for
`QUIET_SECONDS`: nobody is displaced by an owner that takes more. A version that a request in the daemon runs with
stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zsl.errors import AdapterError, UnknownAdapterError
from zsl.trunk.adapter import AdapterVersion
from zsl.trunk.sessions.owned_memory import Entry, OwnedMemory
from zsl.trunk.sessions.sessions import Session
from zsl.wire.adapter_layout import AdapterLayout

# A run that switches between adapters has a few versions in use; those of earlier optimizer steps are never used again.
MAX_VERSIONS_PER_SESSION = 8
QUIET_SECONDS = 60.0

_Key = tuple[bytes, bytes]  # session and version


@dataclass(slots=True)
class _Entry(Entry):
    """Memory of a version, reserved from its first piece on. `adapter` None: pieces are still missing."""

    adapter: AdapterVersion | None = None
    requests: int = 0  # in the daemon, which run with it


class AdapterStore(OwnedMemory[bytes, _Entry]):
    """Versions by session, of up to `memory_bytes` in total. Times are in seconds."""

    what, option = "adapters", "--adapter-memory"

    def reserve(self, session: Session, version: bytes, nbytes: int, now: float) -> bool:
        """Reserve the memory of a version that begins to arrive, and forget what has come of another one.

        Returns False if it is here already. Raises `AdapterError` if it is over the quota of its tenant,
        `OverloadedError` if versions in use take the room.
        """
        for other in [one for one in self._names(session) if self._entries[session.id, one].adapter is None]:
            self._remove((session.id, other))
        if version in self._names(session):
            return False
        quota = self._quota(None if session.tenant is None else session.tenant.max_adapter_bytes)
        if nbytes > quota:
            raise AdapterError(f"an adapter of {nbytes} bytes is over the {quota} that are granted")
        while len(self._names(session)) >= MAX_VERSIONS_PER_SESSION:
            self._evict_one(session, lambda key, entry: not entry.requests and key[0] == session.id)
        while self._of_owner[session.owner] + nbytes > quota:
            self._evict_one(session, lambda key, entry: not entry.requests and entry.owner == session.owner)
        while self.nbytes + nbytes > self._memory_bytes:
            self._evict_one(session, self._displaceable_by(session, nbytes, now))
        self._add(session, version, _Entry(session.owner, now, nbytes))
        return True

    def awaits(self, session: Session, version: bytes) -> bool:
        """Return whether a version has begun to arrive, is not complete, and has not been displaced."""
        entry = self._entries.get((session.id, version))
        return entry is not None and entry.adapter is None

    def known_layout(self, session: Session, digest: bytes) -> AdapterLayout | None:
        """Return the layout of a complete version of this session that came as bytes of this digest."""
        for version in self._names(session):
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
        for version in list(self._names(session)):
            self._remove((session.id, version))

    def _displaceable_by(self, session: Session, nbytes: int, now: float) -> Callable[[_Key, _Entry], bool]:
        """Return the condition on a version to leave for a new one of a session."""
        wanted = self._of_owner[session.owner] + nbytes

        def displaceable(key: _Key, entry: _Entry) -> bool:
            quiet = now - entry.last_used >= QUIET_SECONDS
            of_us = entry.owner == session.owner
            return not entry.requests and (quiet or of_us or self._of_owner[entry.owner] >= wanted)

        return displaceable

    def _rank(self, session: Session, key: _Key) -> tuple[int, ...]:
        return key[0] != session.id, *super()._rank(session, key)
