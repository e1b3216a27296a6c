"""Sessions: leases, quotas, and the stashes held for pending backwards. Pure.

Clock and session ids are arguments. A session is a lease: after `lease_seconds` without a message it ends, and its
stashes are dropped. Losing a stash costs its client time, never a result, so it may be evicted at any moment.

With keys, sessions belong to tenants with quotas, and no tenant can use a session of another. Without keys, each
session counts as its own tenant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from zsl.errors import QuotaError, UnknownSessionError
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.sessions.stash_eviction_order import StashEvictionOrder, StepKey
from zsl.trunk.work import Held

# Clients send a message every few seconds. A session silent for this long may be dead, and can be closed for a new one.
QUIET_SECONDS = 10.0
# Forwards after which a graph is stale, at least.
LEAST_TURNS = 32


@dataclass(slots=True)
class Session:
    """A client's session. `peer`: routing id of its connection, for answers. `heartbeat`: routing id of the connection
    of its pings. `hello`: id of the request that opened it. `checks`: answers on its connection need a checksum of
    their tensors, as its requests have one. `trains`: it has held a step."""

    id: bytes
    peer: bytes
    hello: int
    tenant: Tenant | None
    last_heard: float
    heartbeat: bytes | None = None
    held: dict[int, Held] = field(default_factory=dict)  # by step
    checks: bool = True
    trains: bool = False

    @property
    def peers(self) -> list[bytes]:
        """Routing ids of its connections."""
        return [self.peer] if self.heartbeat is None else [self.peer, self.heartbeat]

    @property
    def owner(self) -> Hashable:
        """Key of its fair share and quotas: the tenant's public key, or the session id."""
        return self.id if self.tenant is None else self.tenant.public_key


class Sessions:
    """Open sessions, up to `max_sessions`, with stashes of up to `stash_memory_bytes` in total."""

    def __init__(
        self,
        *,
        lease_seconds: float,
        max_sessions: int,
        stash_memory_bytes: int,
        new_id: Callable[[], bytes],
    ) -> None:
        # Bytes of graphs and linear outputs, by the number of sessions that train; None: as of all stashes.
        self.graph_memory_of: Callable[[int], int] | None = None
        self._lease_seconds = lease_seconds
        self._max_sessions = max_sessions
        self._stash_memory_bytes = stash_memory_bytes
        self._new_id = new_id
        self._sessions: dict[bytes, Session] = {}
        self._by_peer: dict[bytes, Session] = {}
        self._by_owner: dict[Hashable, dict[bytes, Session]] = {}
        self._held = StashEvictionOrder()
        self._held_of: defaultdict[Hashable, StashEvictionOrder] = defaultdict(StashEvictionOrder)  # by tenant
        self._arrivals = 0  # of held steps
        self._training = 0  # sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of all stashes."""
        return self._held.nbytes

    @property
    def graph_memory_bytes(self) -> int | None:
        """Bytes that graphs and linear outputs may take; None: as all stashes."""
        return None if self.graph_memory_of is None else self.graph_memory_of(self._training)

    def make_room(self, nbytes: int) -> bool:
        """Evict stashes until `nbytes` more fit. Returns False if they exceed the whole stash memory."""
        if nbytes >= self._stash_memory_bytes:
            return False
        self._demote_until(self._held, self._stash_memory_bytes - nbytes)
        return True

    def fits_graph(self, nbytes: int, *, taken_bytes: int, alone: bool) -> bool:
        """Return whether the graph of a pass fits into `graph_memory_bytes` beside those held and `taken_bytes`.

        Without other graphs, that of one request (`alone`) fits whatever it takes. Held ones stay: clients take turns,
        so that the oldest is needed next. One that none has asked for while all clients could have had two steps goes.
        """
        most = self.graph_memory_bytes
        if most is None:
            return True
        stale = self._arrivals - 1 - max(2 * self._training, LEAST_TURNS)
        while (oldest := self._held.oldest_graph()) is not None and oldest[1] < stale:
            self._demote(oldest[0])
        others = self._held.graph_nbytes + taken_bytes
        return others + nbytes <= most or (alone and not others)

    def open(self, peer: bytes, now: float, *, hello: int = 0, tenant: Tenant | None = None) -> Session:
        """Open a new session. Call `eviction_candidate` first."""
        session = Session(self._new_id(), peer, hello, tenant, now)
        self._sessions[session.id] = self._by_peer[peer] = session
        self._by_owner.setdefault(session.owner, {})[session.id] = session
        return session

    def eviction_candidate(self, tenant: Tenant | None, now: float) -> Session | None:
        """Return the silent session to close before this tenant can open another: one of its own, or without keys any.

        None if there is room. Raises `QuotaError` if all are active.
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
                f"{whose} has {len(sessions)} open sessions, which is the limit; close one, or ask its operator",
                retry_after_ms=round(QUIET_SECONDS * 1000),
            )
        return quietest

    def get(self, session_id: bytes, peer: bytes, now: float, *, tenant: Tenant | None = None) -> Session:
        """Return a session, and renew its lease. Raises `UnknownSessionError`, also from another connection."""
        session = self._sessions.get(session_id)
        if session is None or session.peer != peer:
            raise UnknownSessionError("this session is not open here; its lease may have ended")
        return self.renew(session_id, now, tenant=tenant)

    def renew(self, session_id: bytes, now: float, *, tenant: Tenant | None = None) -> Session:
        """Return a session, and renew its lease, from any connection. Raises `UnknownSessionError`, also for a session
        of another tenant."""
        session = self._sessions.get(session_id)
        if session is None or not _same(session.tenant, tenant):
            raise UnknownSessionError("this session is not open here; its lease may have ended")
        session.tenant = tenant  # its quotas may have changed
        session.last_heard = now
        return session

    def resume(
        self, session_id: bytes, peer: bytes, now: float, *, hello: int, tenant: Tenant | None
    ) -> tuple[Session, list[bytes]]:
        """Move a session to a new connection. Returns it and its old connections. Raises `UnknownSessionError`."""
        session = self.renew(session_id, now, tenant=tenant)
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]
        old = [one for one in session.peers if one != peer]
        session.peer, session.hello, session.heartbeat, session.checks = peer, hello, None, True
        self._by_peer[peer] = session
        return session, old

    def of_peer(self, peer: bytes, tenant: Tenant | None = None) -> Session | None:
        """Return the session of a tenant's connection, or None."""
        session = self._by_peer.get(peer)
        return session if session is not None and _same(session.tenant, tenant) else None

    def of_tenant(self, tenant: Tenant | None) -> Iterable[Session]:
        """Return the sessions of a tenant; empty without keys."""
        return () if tenant is None else self._of(tenant).values()

    def close(self, session_id: bytes) -> Session | None:
        """Remove a session, and drop its held steps."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._training -= session.trains
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
        """Return the sessions whose lease has ended."""
        return [session for session in self if now - session.last_heard >= self._lease_seconds]

    def hold(self, session: Session, step: int, held: Held) -> None:
        """Hold a step for its backward, and evict stashes over the limit.

        Over `stash_memory_bytes`, or over its tenant's `max_stash_bytes`, the oldest graphs are evicted first (the
        backward recomputes the forward), then the oldest linear outputs, then the oldest inputs (the client sends them
        again).
        """
        self.release(session, step)
        self._training += not session.trains
        session.trains = True
        self._put(session, step, held, self._arrivals)
        self._arrivals += 1
        tenant = session.tenant
        if tenant is not None and tenant.max_stash_bytes is not None:
            self._demote_until(self._held_of[tenant.public_key], tenant.max_stash_bytes)
        self._demote_until(self._held, self._stash_memory_bytes)

    def _demote_until(self, held: StashEvictionOrder, nbytes: int) -> None:
        """Evict stashes in order, part by part, until at most `nbytes` are held."""
        while held.nbytes > max(nbytes, 0):
            self._demote(held.first())

    def _demote(self, key: StepKey) -> None:
        """Evict the part of a stash that takes most memory."""
        session_id, step = key
        session = self._sessions[session_id]
        evicted, arrival = self._remove(session, step)
        rest = evicted.stash.demoted()
        if rest is not None:
            self._put(session, step, replace(evicted, stash=rest), arrival)

    def take(self, session: Session, step: int) -> Held | None:
        """Remove a held step, and return it, or None."""
        return self._remove(session, step)[0] if step in session.held else None

    def release(self, session: Session, step: int) -> None:
        """Drop the stash of a step, if it is held."""
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

    def _orders_of(self, session: Session) -> list[StashEvictionOrder]:
        return [self._held] if session.tenant is None else [self._held, self._held_of[session.owner]]

    def _of(self, tenant: Tenant) -> dict[bytes, Session]:
        return self._by_owner.get(tenant.public_key, {})


def _same(one: Tenant | None, other: Tenant | None) -> bool:
    return (one and one.public_key) == (other and other.public_key)
