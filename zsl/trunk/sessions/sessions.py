"""Sessions, their leases, and the steps held for them. Pure: the clock and the source of ids come from outside.

A session is a lease: a client that is silent for `lease_seconds` is forgotten, with everything held for it.
Losing a stash costs its client time, never a result, so it may go at any moment.

With keys, sessions belong to tenants, who have quotas; nobody reaches a session of another tenant. Without keys every
session stands for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from zsl.errors import QuotaError, UnknownSessionError
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.sessions.eviction_order import EvictionOrder
from zsl.trunk.work import Held

# A client says something every few seconds. One that has not for so long may have died, and makes room for another.
QUIET_SECONDS = 10.0


@dataclass(slots=True)
class Session:
    """One client's run. `peer` is the routing id of its connection, where its answers go; `heartbeat` that of the
    connection on which it pings. `hello`: the request that opened it."""

    id: bytes
    peer: bytes
    hello: int
    tenant: Tenant | None
    last_heard: float
    heartbeat: bytes | None = None
    held: dict[int, Held] = field(default_factory=dict)  # step -> its backward's needs

    @property
    def peers(self) -> list[bytes]:
        """List its connections."""
        return [self.peer] if self.heartbeat is None else [self.peer, self.heartbeat]

    @property
    def owner(self) -> Hashable:
        """Name the unit of fair shares: the tenant by its key, or the session itself."""
        return self.id if self.tenant is None else self.tenant.public_key


class Sessions:
    """The table of open sessions.

    `max_sessions` bounds their number, `stash_memory_bytes` the memory of all stashes.
    """

    def __init__(
        self,
        *,
        lease_seconds: float,
        max_sessions: int,
        stash_memory_bytes: int,
        new_id: Callable[[], bytes],
    ) -> None:
        self._lease_seconds = lease_seconds
        self._max_sessions = max_sessions
        self._stash_memory_bytes = stash_memory_bytes
        self._new_id = new_id
        self._sessions: dict[bytes, Session] = {}
        self._by_peer: dict[bytes, Session] = {}
        self._by_owner: dict[Hashable, dict[bytes, Session]] = {}
        self._held = EvictionOrder()
        self._held_of: defaultdict[Hashable, EvictionOrder] = defaultdict(EvictionOrder)  # by tenant
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def held_bytes(self) -> int:
        """Sum up the memory of all stashes."""
        return self._held.nbytes

    def make_room(self, nbytes: int) -> bool:
        """Give up the costliest and oldest stashes until `nbytes` more fit. False if they are more than all memory."""
        if nbytes >= self._stash_memory_bytes:
            return False
        self._demote_until(self._held, self._stash_memory_bytes - nbytes)
        return True

    def open(self, peer: bytes, now: float, *, hello: int = 0, tenant: Tenant | None = None) -> Session:
        """Open a new session. Ask `eviction_candidate` first."""
        session = Session(self._new_id(), peer, hello, tenant, now)
        self._sessions[session.id] = self._by_peer[peer] = session
        self._by_owner.setdefault(session.owner, {})[session.id] = session
        return session

    def eviction_candidate(self, tenant: Tenant | None, now: float) -> Session | None:
        """Find the quiet session to close before this tenant can open another: one of its own, or without keys of
        anyone. None if there is room. Raises `QuotaError` if all are at work.
        """
        most, sessions, whose = self._max_sessions, self._sessions, "this daemon"
        if tenant is not None and len(self._of(tenant)) >= tenant.max_sessions:
            most, sessions, whose = tenant.max_sessions, self._of(tenant), f"tenant {tenant.name}"
        if len(sessions) < most:
            return None
        candidates = sessions if tenant is None else self._of(tenant)
        quietest = min(candidates.values(), key=lambda session: session.last_heard, default=None)
        if quietest is None or now - quietest.last_heard < QUIET_SECONDS:
            raise QuotaError(
                f"{whose} has {len(sessions)} open sessions, which is the most; close one, or ask whoever runs it",
                retry_after_ms=round(QUIET_SECONDS * 1000),
            )
        return quietest

    def get(self, session_id: bytes, peer: bytes, now: float, *, tenant: Tenant | None = None) -> Session:
        """Find a session, and renew its lease. Raises `UnknownSessionError`, also for another connection's session."""
        session = self._sessions.get(session_id)
        if session is None or session.peer != peer:
            raise UnknownSessionError("this session is not open here; its lease may have ended")
        return self.renew(session_id, now, tenant=tenant)

    def renew(self, session_id: bytes, now: float, *, tenant: Tenant | None = None) -> Session:
        """Find a session, and renew its lease, from any connection. Raises `UnknownSessionError`, also for one of
        another tenant."""
        session = self._sessions.get(session_id)
        if session is None or not _same(session.tenant, tenant):
            raise UnknownSessionError("this session is not open here; its lease may have ended")
        session.tenant = tenant  # its quotas may have been changed
        session.last_heard = now
        return session

    def resume(
        self, session_id: bytes, peer: bytes, now: float, *, hello: int, tenant: Tenant | None
    ) -> tuple[Session, list[bytes]]:
        """Move a session to a new connection; return it with its old ones. Raises `UnknownSessionError`."""
        session = self.renew(session_id, now, tenant=tenant)
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]
        old = [one for one in session.peers if one != peer]
        session.peer, session.hello, session.heartbeat = peer, hello, None
        self._by_peer[peer] = session
        return session, old

    def of_peer(self, peer: bytes, tenant: Tenant | None = None) -> Session | None:
        """Find the session of a tenant's connection."""
        session = self._by_peer.get(peer)
        return session if session is not None and _same(session.tenant, tenant) else None

    def of_tenant(self, tenant: Tenant | None) -> Iterable[Session]:
        """List the sessions of a tenant; none without keys."""
        return () if tenant is None else self._of(tenant).values()

    def close(self, session_id: bytes) -> Session | None:
        """Forget a session and the steps held for it."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            for step in list(session.held):
                self.release(session, step)
            if self._by_peer.get(session.peer) is session:
                del self._by_peer[session.peer]
            of_owner = self._by_owner[session.owner]
            del of_owner[session_id]
            if not of_owner:
                del self._by_owner[session.owner]
                self._held_of.pop(session.owner, None)
        return session

    def expired(self, now: float) -> list[Session]:
        """List the sessions whose lease has ended."""
        return [session for session in self if now - session.last_heard >= self._lease_seconds]

    def hold(self, session: Session, step: int, held: Held) -> None:
        """Hold a step for its backward, and stay within the memory.

        Over `stash_memory_bytes`, or over its tenant's `max_stash_bytes`, the oldest graphs are given up first (their
        backward computes the forward again), then the oldest products of linear layers, then the oldest inputs (their
        client sends them again).
        """
        self.release(session, step)
        self._put(session, step, held, next(self._arrivals))
        tenant = session.tenant
        if tenant is not None and tenant.max_stash_bytes is not None:
            self._demote_until(self._held_of[tenant.public_key], tenant.max_stash_bytes)
        self._demote_until(self._held, self._stash_memory_bytes)

    def _demote_until(self, held: EvictionOrder, nbytes: int) -> None:
        """Give up the costliest stashes, and of these the oldest, until no more than `nbytes` are held."""
        while held.nbytes > nbytes:
            session_id, step = held.first()
            session = self._sessions[session_id]
            given_up, arrival = self._remove(session, step)
            left = given_up.stash.demoted()
            if left is not None:
                self._put(session, step, replace(given_up, stash=left), arrival)

    def take(self, session: Session, step: int) -> Held | None:
        """Remove a held step, and return it."""
        return self._remove(session, step)[0] if step in session.held else None

    def release(self, session: Session, step: int) -> None:
        """Drop a step, if it is held."""
        held = self.take(session, step)
        if held is not None:
            held.stash.drop()

    def _put(self, session: Session, step: int, held: Held, arrival: int) -> None:
        session.held[step] = held
        for order in self._orders_of(session):
            order.put((session.id, step), held.stash.keep, arrival, held.stash.nbytes)

    def _remove(self, session: Session, step: int) -> tuple[Held, int]:
        held, arrival = session.held.pop(step), 0
        for order in self._orders_of(session):
            arrival = order.remove((session.id, step))
        return held, arrival

    def _orders_of(self, session: Session) -> list[EvictionOrder]:
        return [self._held] if session.tenant is None else [self._held, self._held_of[session.owner]]

    def _of(self, tenant: Tenant) -> dict[bytes, Session]:
        return self._by_owner.get(tenant.public_key, {})


def _same(one: Tenant | None, other: Tenant | None) -> bool:
    return (one and one.public_key) == (other and other.public_key)
