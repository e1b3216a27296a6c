"""Sessions, their leases, and what is kept for them. Pure: the clock and the source of ids come from outside.

A session is a lease: a client that is not heard of for `lease_seconds` is forgotten, with everything kept for it.
Losing a stash costs its client time, never a result, so it may go at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from zsl.errors import OverloadedError, UnknownSessionError
from zsl.trunk.work import Held, Keep


@dataclass(slots=True)
class Session:
    """One client's run. `peer` is the routing id that it was opened from: where its answers go."""

    id: bytes
    peer: bytes
    expires: float
    held: dict[int, Held] = field(default_factory=dict)  # step -> what its backward needs
    inflight: dict[int, int] = field(default_factory=dict)  # request -> bytes
    abandoned: set[int] = field(default_factory=set)  # requests in flight whose step the client no longer wants

    @property
    def inflight_bytes(self) -> int:
        return sum(self.inflight.values())


# What is given up first when memory runs short.
_COSTLIEST_FIRST = (Keep.GRAPH_AND_PRODUCTS, Keep.GRAPH, Keep.PRODUCTS, Keep.INPUT)


class Sessions:
    """The table of open sessions.

    `max_inflight_requests` and `max_inflight_bytes` are the credit of one session, `max_total_inflight_bytes` that
    of all together; `stash_memory_bytes` bounds what is kept for pending backwards.
    """

    def __init__(
        self,
        *,
        lease_seconds: float,
        max_inflight_requests: int,
        max_inflight_bytes: int,
        max_total_inflight_bytes: int,
        stash_memory_bytes: int,
        new_id: Callable[[], bytes],
    ) -> None:
        self._lease_seconds = lease_seconds
        self._max_inflight_requests = max_inflight_requests
        self._max_inflight_bytes = max_inflight_bytes
        self._max_total_inflight_bytes = max_total_inflight_bytes
        self._stash_memory_bytes = stash_memory_bytes
        self._new_id = new_id
        self._sessions: dict[bytes, Session] = {}
        self._inflight_bytes = 0
        self._held_bytes = 0
        # What is kept, by session and step, with the number of its arrival.
        self._held_by_keep: dict[Keep, dict[tuple[bytes, int], int]] = {keep: {} for keep in _COSTLIEST_FIRST}
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def held_bytes(self) -> int:
        """The memory that all stashes take."""
        return self._held_bytes

    @property
    def has_room(self) -> bool:
        """Whether there is memory left for a stash."""
        return self._held_bytes < self._stash_memory_bytes

    def open(self, peer: bytes, now: float) -> Session:
        """A new session."""
        session = Session(self._new_id(), peer, now + self._lease_seconds)
        self._sessions[session.id] = session
        return session

    def get(self, session_id: bytes, peer: bytes, now: float) -> Session:
        """The session, its lease renewed. Raises `UnknownSessionError`, also for another connection's session."""
        session = self._sessions.get(session_id)
        if session is None or session.peer != peer:
            raise UnknownSessionError("this session is not open here; its lease may have ended")
        session.expires = now + self._lease_seconds
        return session

    def of_peer(self, peer: bytes) -> list[Session]:
        """The sessions that were opened from a connection."""
        return [session for session in self._sessions.values() if session.peer == peer]

    def close(self, session_id: bytes) -> Session | None:
        """Forget a session and what is kept for it."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            for step in list(session.held):
                self._drop(session, step)
            self._inflight_bytes -= session.inflight_bytes
        return session

    def expired(self, now: float) -> list[Session]:
        """The sessions whose lease has ended."""
        return [session for session in self._sessions.values() if session.expires <= now]

    def admit(self, session: Session, request: int, nbytes: int, *, retry_after_ms: int = 50) -> None:
        """Count a request as in flight. Raises `OverloadedError` over the session's credit, or over that of all."""
        over_bytes = session.inflight and session.inflight_bytes + nbytes > self._max_inflight_bytes
        if len(session.inflight) >= self._max_inflight_requests or over_bytes:
            raise OverloadedError(
                f"the session has {len(session.inflight)} requests and {session.inflight_bytes} bytes in flight; "
                f"{self._max_inflight_requests} and {self._max_inflight_bytes} are granted",
                retry_after_ms=retry_after_ms,
            )
        if self._inflight_bytes and self._inflight_bytes + nbytes > self._max_total_inflight_bytes:
            raise OverloadedError(
                f"all sessions together have {self._inflight_bytes} bytes in flight", retry_after_ms=retry_after_ms
            )
        session.inflight[request] = nbytes
        self._inflight_bytes += nbytes

    def finish(self, session_id: bytes, request: int) -> Session | None:
        """The request is answered; its session if that is still open."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._inflight_bytes -= session.inflight.pop(request, 0)
        return session

    def hold(self, session: Session, step: int, held: Held) -> None:
        """Keep what the step's backward needs, unless the client has let go of it; then stay within the memory.

        Over `stash_memory_bytes` the oldest graphs are given up first (their backward computes the forward again),
        then the oldest products of linear layers, then the oldest inputs (their client sends them again).
        """
        if step in session.abandoned:
            session.abandoned.discard(step)
            held.stash.drop()
            return
        self._drop(session, step)
        self._put(session, step, held, next(self._arrivals))
        while self._held_bytes > self._stash_memory_bytes:
            costliest = next(keys for keep in _COSTLIEST_FIRST if (keys := self._held_by_keep[keep]))
            session_id, oldest = min(costliest, key=costliest.__getitem__)
            arrival = costliest[session_id, oldest]
            other = self._sessions[session_id]
            given_up = self.take(other, oldest)
            assert given_up is not None
            left = given_up.stash.demoted()
            if left is not None:
                self._put(other, oldest, replace(given_up, stash=left), arrival)

    def take(self, session: Session, step: int) -> Held | None:
        """What was kept for a step, which is kept no more."""
        held = session.held.pop(step, None)
        if held is not None:
            self._held_bytes -= held.stash.nbytes
            del self._held_by_keep[held.stash.keep][session.id, step]
        return held

    def release(self, session: Session, step: int) -> None:
        """The client will ask no backward for this step, which may still be in flight."""
        self._drop(session, step)
        if step in session.inflight:
            session.abandoned.add(step)

    def _drop(self, session: Session, step: int) -> None:
        held = self.take(session, step)
        if held is not None:
            held.stash.drop()

    def _put(self, session: Session, step: int, held: Held, arrival: int) -> None:
        session.held[step] = held
        self._held_bytes += held.stash.nbytes
        self._held_by_keep[held.stash.keep][session.id, step] = arrival
