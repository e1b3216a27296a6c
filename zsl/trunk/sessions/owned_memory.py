"""Memory of what sessions keep in the daemon, counted in total and by owner (tenant, or session without keys). Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from zsl.errors import OverloadedError
from zsl.trunk.sessions.sessions import Session

RETRY_AFTER_MS = 200


@dataclass(slots=True)
class Entry:
    """Memory of one thing that an owner keeps. `last_used` is in seconds."""

    owner: Hashable
    last_used: float
    nbytes: int = 0


Name = TypeVar("Name", bytes, int)
EntryT = TypeVar("EntryT", bound=Entry)


class OwnedMemory(Generic[Name, EntryT]):
    """Entries by session and name, of up to `memory_bytes` in total."""

    what: ClassVar[str]  # for errors
    option: ClassVar[str]

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._entries: OrderedDict[tuple[bytes, Name], EntryT] = OrderedDict()  # least recently used first
        self._of_owner: Counter[Hashable] = Counter()  # bytes
        self._of_session: dict[bytes, set[Name]] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _names(self, session: Session) -> set[Name]:
        return self._of_session.get(session.id, set())

    def _quota(self, of_tenant: int | None) -> int:
        return self._memory_bytes if of_tenant is None else min(of_tenant, self._memory_bytes)

    def _add(self, session: Session, name: Name, entry: EntryT) -> None:
        self._entries[session.id, name] = entry
        self._of_session.setdefault(session.id, set()).add(name)
        self._count(entry, entry.nbytes)

    def _count(self, entry: EntryT, nbytes: int) -> None:
        self.nbytes += nbytes
        self._of_owner[entry.owner] += nbytes

    def _remove(self, key: tuple[bytes, Name]) -> None:
        entry = self._entries.pop(key)
        self._count(entry, -entry.nbytes)
        if not self._of_owner[entry.owner]:
            del self._of_owner[entry.owner]
        of_session = self._of_session[key[0]]
        of_session.discard(key[1])
        if not of_session:
            del self._of_session[key[0]]

    def _evict_one(self, session: Session, may_leave: Callable[[tuple[bytes, Name], EntryT], bool]) -> None:
        """Remove the entry that leaves first: of the same owner, then of whoever uses most.

        Raises `OverloadedError` if none may leave.
        """
        candidates = [key for key, entry in self._entries.items() if may_leave(key, entry)]
        if not candidates:
            raise OverloadedError(
                f"the daemon's memory for {self.what} is in use; its operator can give it more with {self.option}",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._remove(min(candidates, key=lambda key: self._rank(session, key)))  # the oldest of equal ones

    def _rank(self, session: Session, key: tuple[bytes, Name]) -> tuple[int, ...]:
        owner = self._entries[key].owner
        return owner != session.owner, -self._of_owner[owner]
