"""Fair queue of one class of work: the tenant that has used least of the device is next. Pure.

Each tenant has a counter of its used device time divided by its weight; the lowest counter runs first (the virtual
token counter of Sheng et al., "Fairness in Serving Large Language Models", 2024, over measured cost instead of tokens).
The counter of a tenant that was idle is raised to the last lowest one, so that idling saves up nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count

from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.work import Kind

# Tenants whose next job is too large for the rest of a batch that are skipped before the batch is closed.
MAX_PASSED_OVER = 4


@dataclass(slots=True, eq=False)
class _Tenant:
    weight: float
    queues: dict[Kind, deque[Job]]  # in the order in which they run
    counter: float = 0.0
    waits_since: float = 0.0  # time of its last batch, or the end of its idle time
    place: dict[_Order, int] = field(default_factory=dict)  # tie-breaker of its valid entry in each order

    @property
    def backlogged(self) -> bool:
        return any(self.queues.values())

    @property
    def next_job(self) -> Job:
        return next(queue for queue in self.queues.values() if queue)[0]


class _Order:
    """Heap of the tenants whose next job of a kind has this merge key, lowest counter first.

    Each tenant has one valid entry. If its counter has grown since, the entry is updated when it is the first.
    """

    __slots__ = ("_heap", "_kind", "_merge_key", "_ties")

    def __init__(self, kind: Kind, merge_key: Hashable | None) -> None:
        self._kind = kind
        self._merge_key = merge_key
        self._heap: list[tuple[float, int, _Tenant]] = []
        self._ties = count()

    def put(self, tenant: _Tenant) -> None:
        """Add a tenant, or add it again after its counter has decreased."""
        tie = tenant.place[self] = next(self._ties)
        heappush(self._heap, (tenant.counter, tie, tenant))

    def lowest(self) -> _Tenant | None:
        """Return the first tenant, without removing it."""
        heap = self._heap
        while heap:
            counter, tie, tenant = heap[0]
            if tenant.place.get(self) != tie:
                heappop(heap)
                continue
            queue = tenant.queues[self._kind]
            if not queue or queue[0].merge_key != self._merge_key:
                heappop(heap)
                del tenant.place[self]
            elif counter < tenant.counter:
                tie = tenant.place[self] = next(self._ties)
                heapreplace(heap, (tenant.counter, tie, tenant))
            else:
                return tenant
        return None

    def pop_lowest(self) -> _Tenant | None:
        """Remove and return the first tenant."""
        tenant = self.lowest()
        if tenant is not None:
            heappop(self._heap)
            del tenant.place[self]
        return tenant


class FairQueue:
    """Queues of jobs by tenant. `kinds`: of these jobs, in the order in which a tenant's jobs run."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._tenants: dict[Hashable, _Tenant] = {}
        self._orders: dict[Kind, dict[Hashable, _Order]] = {kind: {} for kind in kinds}  # by merge key
        self._waits: deque[tuple[float, _Tenant]] = deque()  # by `waits_since`; stale if that has changed
        self._jobs = 0
        self._floor = 0.0  # the lowest counter when it was last served

    def __len__(self) -> int:
        return self._jobs

    def add(self, job: Job, now: float, weight: float) -> None:
        """Queue a job of a tenant of this weight."""
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            tenant = self._tenants[job.tenant] = _Tenant(weight, {kind: deque() for kind in self._orders})
        tenant.weight = weight
        if not tenant.backlogged:
            tenant.counter = max(tenant.counter, self._floor)
            self._begin_wait(tenant, now)
        queue = tenant.queues[job.kind]
        queue.append(job)
        self._jobs += 1
        if len(queue) == 1:
            self._put(job.kind, tenant)

    def discard(self, job: Job) -> None:
        """Remove a queued job."""
        tenant = self._tenants[job.tenant]
        queue = tenant.queues[job.kind]
        was_next = queue[0] is job
        queue.remove(job)
        self._jobs -= 1
        if was_next:
            self._put(job.kind, tenant)

    def forget(self, tenant: Hashable) -> None:
        """Forget a tenant without queued jobs, and its counter."""
        found = self._tenants.get(tenant)
        if found is not None and not found.backlogged:
            del self._tenants[tenant]

    def first(self, frees_graphs: bool = False) -> Job | None:
        """Return the next job of the tenant with the lowest counter; with `frees_graphs`, of those whose job frees one
        if there is any."""
        if frees_graphs and (found := self._first_that_frees()) is not None:
            return found
        lowest: _Tenant | None = None
        kind: Kind | None = None
        for order_kind, orders in self._orders.items():
            for key, order in list(orders.items()):
                tenant = order.lowest()
                if tenant is None:
                    del orders[key]
                elif lowest is None or tenant.counter < lowest.counter:
                    lowest, kind = tenant, order_kind
        if lowest is None or kind is None:
            return None
        self._floor = max(self._floor, lowest.counter)
        return lowest.queues[kind][0]

    def _first_that_frees(self) -> Job | None:
        found = [
            (tenant.counter, queue[0])
            for tenant in self._tenants.values()
            for queue in tenant.queues.values()
            if queue and queue[0].frees_graph
        ]
        return min(found, key=lambda one: one[0])[1] if found else None

    def longest_waiting(self) -> tuple[float, Job] | None:
        """Return the next job of the tenant without a batch for longest, and since when it has waited."""
        while self._waits:
            since, tenant = self._waits[0]
            if since == tenant.waits_since and tenant.backlogged:
                return since, tenant.next_job
            self._waits.popleft()
        return None

    def take_with_others(self, first: Job, max_tokens: int, now: float) -> list[Job]:
        """Remove the first job of its tenant, and those that share its pass, in fair order, up to `max_tokens`."""
        batch, tokens = [first], first.tokens
        self._take(first, now)
        if first.merge_key is None or tokens >= max_tokens:
            return batch
        order = self._order(first.kind, first.merge_key)
        passed_over: list[_Tenant] = []
        while len(passed_over) < MAX_PASSED_OVER and (tenant := order.pop_lowest()) is not None:
            job = tenant.queues[first.kind][0]
            if tokens + job.tokens > max_tokens:
                passed_over.append(tenant)
                continue
            batch.append(job)
            tokens += job.tokens
            self._take(job, now)
            if tokens == max_tokens:
                break
        for tenant in passed_over:
            order.put(tenant)
        return batch

    def charge(self, job: Job, seconds: float) -> bool:
        """Add device time, which may be negative, to the counter of a job's tenant. False if that is forgotten."""
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            return False
        tenant.counter += seconds / tenant.weight
        for kind in self._orders:
            self._put(kind, tenant, again=seconds < 0)
        return True

    def _take(self, job: Job, now: float) -> None:
        """Remove the first job of its queue, and charge its tenant for the expected time."""
        tenant = self._tenants[job.tenant]
        taken = tenant.queues[job.kind].popleft()
        assert taken is job
        self._jobs -= 1
        if tenant.backlogged and tenant.waits_since != now:
            self._begin_wait(tenant, now)
        self.charge(job, job.cost_seconds)

    def _begin_wait(self, tenant: _Tenant, now: float) -> None:
        tenant.waits_since = now
        self._waits.append((now, tenant))
        if len(self._waits) > 2 * len(self._tenants) + 64:  # most entries are stale
            self._waits = deque(entry for entry in self._waits if entry[0] == entry[1].waits_since)

    def _put(self, kind: Kind, tenant: _Tenant, *, again: bool = False) -> None:
        """Add a tenant to the order of its next job of a kind."""
        queue = tenant.queues[kind]
        if queue:
            order = self._order(kind, queue[0].merge_key)
            if again or order not in tenant.place:
                order.put(tenant)

    def _order(self, kind: Kind, merge_key: Hashable | None) -> _Order:
        order = self._orders[kind].get(merge_key)
        if order is None:
            order = self._orders[kind][merge_key] = _Order(kind, merge_key)
        return order
