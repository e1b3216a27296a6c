"""Scheduler of requests: orders queued jobs by fair share, and merges them into batches. Pure.

- When the device is free, a queued job runs. There is no batching window; a pass is delayed only if
  jobs that could merge are expected so soon that they save more than the delay costs
  (`zsl.trunk.scheduling.anticipation`).
- Fair: each tenant has a counter of its used device time divided by its weight; the lowest counter runs first (the
  virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", 2024, over measured cost instead
  of tokens). The counter of a tenant that was idle is raised to the last lowest one, so that idling saves up nothing.
- A tenant's backwards run before its forwards: they end a step and free memory.
- Small jobs of one kind share a pass up to a budget of tokens, taken in the order of fairness.
- Aging: one batch in `AGED_BATCH_EVERY` serves the longest-waiting tenant that had no batch for `max_wait_seconds`,
  regardless of counters. So a stream of new tenants cannot starve one, and under overload fairness still decides.

No sockets, no torch; time is an argument.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from zsl.trunk.costs import UNKNOWN_COSTS, Costs
from zsl.trunk.scheduling.anticipation import Anticipation
from zsl.trunk.work import Kind

# Tenants whose next job is too large for the rest of a batch that are skipped before the batch is closed.
MAX_PASSED_OVER = 4
AGED_BATCH_EVERY = 8


@dataclass(frozen=True, slots=True)
class Job:
    """A queued request, as the scheduler sees it.

    `merge_key`: jobs of one kind with equal keys can share a pass; None runs alone. `cost_seconds`: its expected time,
    which `Scheduler.charge` corrects. `deadline`: seconds on the clock of `now`. `client`: its client within the
    tenant; None if the tenant is one client.
    """

    key: Hashable
    tenant: Hashable
    kind: Kind
    tokens: int  # rows x tokens
    merge_key: Hashable | None
    cost_seconds: float
    deadline: float
    client: Hashable = None

    @property
    def comes_from(self) -> Hashable:
        return self.tenant if self.client is None else self.client


@dataclass(slots=True, eq=False)
class _Tenant:
    weight: float
    counter: float = 0.0
    waits_since: float = 0.0  # time of its last batch, or the end of its idle time
    forwards: deque[Job] = field(default_factory=deque)
    backwards: deque[Job] = field(default_factory=deque)
    place: dict[_Order, int] = field(default_factory=dict)  # tie-breaker of its valid entry in each order

    @property
    def backlogged(self) -> bool:
        return bool(self.backwards or self.forwards)

    def queue(self, kind: Kind) -> deque[Job]:
        return self.backwards if kind is Kind.BACKWARD else self.forwards


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
            queue = tenant.queue(self._kind)
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


class Scheduler:
    """Queue of jobs. `max_batch_tokens` bounds a merged pass; a larger single job runs alone.

    `costs`: of the trunk; if unknown, no pass is delayed.
    `waits_until`: the time to call `take_batch` again if no job arrives before; None unless it delays a queued job.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_wait_seconds: float = 10.0,
        costs: Costs = UNKNOWN_COSTS,
    ) -> None:
        self.waits_until: float | None = None
        self._waits_since: float | None = None
        self._anticipation = Anticipation(costs)
        self._queued_tokens: Counter[tuple[Kind, Hashable]] = Counter()
        self._max_batch_tokens = max_batch_tokens
        self._max_wait_seconds = max_wait_seconds
        self._tenants: dict[Hashable, _Tenant] = {}
        self._queued: dict[Hashable, Job] = {}
        self._queued_of: Counter[Hashable] = Counter()  # by client
        self._backlog_seconds = 0.0
        self._orders: dict[Kind, dict[Hashable, _Order]] = {Kind.BACKWARD: {}, Kind.FORWARD: {}}  # by merge key
        self._waits: deque[tuple[float, _Tenant]] = deque()  # by `waits_since`; stale if that has changed
        self._deadlines: list[tuple[float, int, Job]] = []
        self._ties = count()
        self._batches = 0
        self._floor = 0.0  # the lowest counter when it was last served

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def backlog_seconds(self) -> float:
        """Sum of the expected seconds of all queued jobs."""
        return max(self._backlog_seconds, 0.0)

    def add(self, job: Job, now: float, *, weight: float = 1.0) -> None:
        """Queue a job of a tenant of this weight. Ignores a key that is queued already."""
        if job.key in self._queued:
            return
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            tenant = self._tenants[job.tenant] = _Tenant(weight)
        tenant.weight = weight
        if not tenant.backlogged:
            tenant.counter = max(tenant.counter, self._floor)
            self._begin_wait(tenant, now)
        queue = tenant.queue(job.kind)
        queue.append(job)
        if len(queue) == 1:
            self._put(job.kind, tenant)
        self._queued[job.key] = job
        self._backlog_seconds += job.cost_seconds
        self._queued_tokens[job.kind, job.merge_key] += job.tokens
        self._queued_of[job.comes_from] += 1
        self._anticipation.arrived(job.comes_from, job.kind, job.merge_key, job.tokens, now)
        self._note_deadline(job)

    def discard(self, key: Hashable) -> bool:
        """Remove a queued job. False if its key is unknown."""
        job = self._queued.get(key)
        if job is None:
            return False
        tenant = self._tenants[job.tenant]
        queue = tenant.queue(job.kind)
        was_next = queue[0] is job
        queue.remove(job)
        if was_next and queue:
            self._put(job.kind, tenant)
        self._forget(job)
        return True

    def forget_client(self, client: Hashable) -> None:
        """Forget a closed client."""
        self._anticipation.forget(client)

    def forget_tenant(self, tenant: Hashable) -> None:
        """Forget a tenant and its counter. Its jobs must have been discarded."""
        self._anticipation.forget(tenant)
        found = self._tenants.get(tenant)
        if found is not None and not found.backlogged:
            del self._tenants[tenant]

    def take_expired(self, now: float) -> list[Job]:
        """Remove and return the jobs past their deadline."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, job = heappop(self._deadlines)
            if self._queued.get(job.key) is job:
                self.discard(job.key)
                expired.append(job)
        return expired

    def take_batch(self, now: float) -> list[Job]:
        """Remove and return the jobs of the next pass, all of one kind. Empty if none is queued, or while delayed."""
        first = self._first(now)
        self.waits_until = None if first is None else self._delay_until(first, now)
        if self.waits_until is not None:
            return []
        self._waits_since = None
        if first is None:
            return []
        self._batches += 1
        batch, tokens = [first], first.tokens
        self._take(first, now)
        if first.merge_key is None or tokens >= self._max_batch_tokens:
            return batch
        order = self._order(first.kind, first.merge_key)
        passed_over: list[_Tenant] = []
        while len(passed_over) < MAX_PASSED_OVER and (tenant := order.pop_lowest()) is not None:
            job = tenant.queue(first.kind)[0]
            if tokens + job.tokens > self._max_batch_tokens:
                passed_over.append(tenant)
                continue
            batch.append(job)
            tokens += job.tokens
            self._take(job, now)
            if tokens == self._max_batch_tokens:
                break
        for tenant in passed_over:
            order.put(tenant)
        return batch

    def charge(self, batch: list[Job], seconds: float, now: float) -> None:
        """Correct the counters after a batch of `seconds`, which its jobs share by their tokens."""
        all_tokens = sum(job.tokens for job in batch)
        for job in batch:
            tenant = self._tenants.get(job.tenant)
            if tenant is not None:
                share = seconds * job.tokens / all_tokens
                self._add_to_counter(tenant, (share - job.cost_seconds) / tenant.weight)
                if not self._queued_of[job.comes_from]:
                    self._anticipation.answered(job.comes_from, job.kind, now)

    def _delay_until(self, first: Job, now: float) -> float | None:
        """Return the time until which to delay this job's pass for jobs that can merge; None if not worthwhile."""
        if first.merge_key is None:
            return None
        room = self._max_batch_tokens - self._queued_tokens[first.kind, first.merge_key]
        until = self._anticipation.worth_waiting_until(first.kind, first.merge_key, room, now)
        if until is None:
            return None
        if self._waits_since is None:
            self._waits_since = now
        until = min(until, self._waits_since + self._anticipation.longest_wait_seconds(first.kind))
        return until if until > now else None

    def _note_deadline(self, job: Job) -> None:
        heappush(self._deadlines, (job.deadline, next(self._ties), job))
        if len(self._deadlines) > 2 * len(self._queued) + 64:  # most entries are stale
            self._deadlines = [entry for entry in self._deadlines if self._queued.get(entry[2].key) is entry[2]]
            heapify(self._deadlines)

    def _first(self, now: float) -> Job | None:
        """Return the next job: of the tenant with the lowest counter, backwards first; or of one that has waited too
        long."""
        if self._batches % AGED_BATCH_EVERY == 0 and (aged := self._aged(now)) is not None:
            return (aged.backwards or aged.forwards)[0]
        lowest: _Tenant | None = None
        kind = Kind.BACKWARD
        for order_kind, orders in self._orders.items():
            for key, order in list(orders.items()):
                tenant = order.lowest()
                if tenant is None:
                    del orders[key]
                elif lowest is None or tenant.counter < lowest.counter:
                    lowest, kind = tenant, order_kind
        if lowest is None:
            return None
        self._floor = max(self._floor, lowest.counter)
        return lowest.queue(kind)[0]

    def _aged(self, now: float) -> _Tenant | None:
        """Return the longest-waiting tenant, if over `max_wait_seconds`."""
        while self._waits:
            since, tenant = self._waits[0]
            if since != tenant.waits_since or not tenant.backlogged:
                self._waits.popleft()
                continue
            return tenant if now - since >= self._max_wait_seconds else None
        return None

    def _begin_wait(self, tenant: _Tenant, now: float) -> None:
        tenant.waits_since = now
        self._waits.append((now, tenant))
        if len(self._waits) > 2 * len(self._tenants) + 64:  # most entries are stale
            self._waits = deque(entry for entry in self._waits if entry[0] == entry[1].waits_since)

    def _take(self, job: Job, now: float) -> None:
        """Remove the first job of its queue, and charge its tenant for the expected time."""
        tenant = self._tenants[job.tenant]
        taken = tenant.queue(job.kind).popleft()
        assert taken is job
        self._forget(job)
        if tenant.backlogged and tenant.waits_since != now:
            self._begin_wait(tenant, now)
        self._add_to_counter(tenant, job.cost_seconds / tenant.weight)

    def _forget(self, job: Job) -> None:
        del self._queued[job.key]
        self._queued_of[job.comes_from] -= 1
        if not self._queued_of[job.comes_from]:
            del self._queued_of[job.comes_from]
        self._backlog_seconds -= job.cost_seconds
        alike = job.kind, job.merge_key
        self._queued_tokens[alike] -= job.tokens
        if not self._queued_tokens[alike]:
            del self._queued_tokens[alike]

    def _add_to_counter(self, tenant: _Tenant, amount: float) -> None:
        tenant.counter += amount
        for kind in self._orders:
            self._put(kind, tenant, again=amount < 0)

    def _put(self, kind: Kind, tenant: _Tenant, *, again: bool = False) -> None:
        """Add a tenant to the order of its next job."""
        queue = tenant.queue(kind)
        if queue:
            order = self._order(kind, queue[0].merge_key)
            if again or order not in tenant.place:
                order.put(tenant)

    def _order(self, kind: Kind, merge_key: Hashable | None) -> _Order:
        order = self._orders[kind].get(merge_key)
        if order is None:
            order = self._orders[kind][merge_key] = _Order(kind, merge_key)
        return order
