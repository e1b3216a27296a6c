"""In which order requests are computed, and which of them together. Pure: no sockets, no torch, the clock is given.

- Work-conserving: whenever the device is free, what is queued goes. There is no waiting window.
- Fair: every tenant has a counter of the device time that it has used, divided by its weight; the lowest goes first
  (the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", 2024, over measured cost
  instead of tokens). A tenant that comes back from idling is lifted to the lowest counter of those that wait, so
  that it cannot spend what it saved up.
- A tenant's backwards go before its forwards: they end a step and free memory.
- Small jobs of one kind share a pass up to a budget of tokens, gathered in the order of fairness.
- Aging: a job that has waited for `max_wait_seconds` goes next, whatever the counters say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

from zsl.trunk.work import Kind

# So many tenants whose next job does not fit are passed over while one batch is gathered.
MAX_PASSED_OVER = 64


@dataclass(frozen=True, slots=True)
class Job:
    """A queued request, as far as ordering needs to know it.

    `merge_key`: jobs of one kind with equal keys can share a pass; None runs alone. `cost_seconds`: what it is
    expected to take; `Scheduler.charge` corrects that. `deadline`: seconds on the clock of `now`.
    """

    key: Hashable
    tenant: Hashable
    kind: Kind
    tokens: int  # rows x tokens
    merge_key: Hashable | None
    cost_seconds: float
    deadline: float


@dataclass(slots=True, eq=False)
class _Tenant:
    weight: float
    counter: float = 0.0
    jobs: dict[Kind, deque[Job]] = field(default_factory=lambda: {kind: deque() for kind in Kind})

    @property
    def backlogged(self) -> bool:
        return any(self.jobs.values())


class Scheduler:
    """A queue of jobs. `max_batch_tokens` bounds a merged pass; a larger single job still runs, alone."""

    def __init__(self, *, max_batch_tokens: int, max_wait_seconds: float = 10.0) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_wait_seconds = max_wait_seconds
        self._tenants: dict[Hashable, _Tenant] = {}
        self._queued: dict[Hashable, Job] = {}
        self._backlog_seconds = 0.0
        # Tenants with a job of a kind, lowest counter first. Entries whose counter has changed since are stale.
        self._order: dict[Kind, list[tuple[float, int, _Tenant]]] = {kind: [] for kind in Kind}
        self._ages: deque[tuple[float, Job]] = deque()  # by arrival; entries of jobs that are gone are stale
        self._deadlines: list[tuple[float, int, Job]] = []
        self._ties = count()
        self._floor = 0.0  # the counter of the tenant that was served last

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def backlog_seconds(self) -> float:
        """What all queued jobs are expected to take, one by one."""
        return max(self._backlog_seconds, 0.0)

    def add(self, job: Job, now: float, *, weight: float = 1.0) -> None:
        """Queue a job of a tenant of this weight. A key that is queued already keeps its place."""
        if job.key in self._queued:
            return
        tenant = self._tenants.setdefault(job.tenant, _Tenant(weight))
        tenant.weight = weight
        if not tenant.backlogged:
            tenant.counter = max(tenant.counter, self._lowest_counter())
        queue = tenant.jobs[job.kind]
        queue.append(job)
        if len(queue) == 1:
            self._push(job.kind, tenant)
        self._queued[job.key] = job
        self._backlog_seconds += job.cost_seconds
        self._ages.append((now, job))
        self._note_deadline(job)

    def discard(self, key: Hashable) -> bool:
        """Take a job out; whether it was there."""
        job = self._queued.get(key)
        if job is None:
            return False
        queue = self._tenants[job.tenant].jobs[job.kind]
        queue.remove(job)
        self._forget(job)
        return True

    def forget_tenant(self, tenant: Hashable) -> None:
        """The tenant is gone, and with it its counter; its jobs must have been discarded."""
        found = self._tenants.get(tenant)
        if found is not None and not found.backlogged:
            del self._tenants[tenant]

    def take_expired(self, now: float) -> list[Job]:
        """Take out the jobs whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, job = heappop(self._deadlines)
            if self._queued.get(job.key) is job:
                self.discard(job.key)
                expired.append(job)
        return expired

    def take_batch(self, now: float) -> list[Job]:
        """Take the jobs of the next pass, all of one kind. Empty if nothing is queued."""
        first = self._first(now)
        if first is None:
            return []
        batch, tokens = [first], first.tokens
        self._take(first)
        if first.merge_key is None or tokens >= self._max_batch_tokens:
            return batch
        passed_over: list[_Tenant] = []
        while len(passed_over) < MAX_PASSED_OVER and (tenant := self._pop_lowest(first.kind)) is not None:
            job = tenant.jobs[first.kind][0]
            if job.merge_key != first.merge_key or tokens + job.tokens > self._max_batch_tokens:
                passed_over.append(tenant)
                continue
            batch.append(job)
            tokens += job.tokens
            self._take(job)
            if tokens == self._max_batch_tokens:
                break
        for tenant in passed_over:
            self._push(first.kind, tenant)
        return batch

    def charge(self, batch: list[Job], seconds: float) -> None:
        """A batch has run and took `seconds`: correct what its tenants were charged when it was taken.

        Each job bears the share of its tokens.
        """
        all_tokens = sum(job.tokens for job in batch)
        for job in batch:
            tenant = self._tenants.get(job.tenant)
            if tenant is not None:
                share = seconds * job.tokens / all_tokens
                self._add_to_counter(tenant, (share - job.cost_seconds) / tenant.weight)

    def _note_deadline(self, job: Job) -> None:
        heappush(self._deadlines, (job.deadline, next(self._ties), job))
        if len(self._deadlines) > 2 * len(self._queued) + 64:  # most are of jobs that are gone
            self._deadlines = [entry for entry in self._deadlines if self._queued.get(entry[2].key) is entry[2]]
            heapify(self._deadlines)

    def _first(self, now: float) -> Job | None:
        """The job that is due: one that has waited too long, else of the lowest tenant, its backward before."""
        while self._ages:
            arrived, oldest = self._ages[0]
            if self._queued.get(oldest.key) is not oldest:
                self._ages.popleft()
                continue
            if now - arrived < self._max_wait_seconds:
                break
            # Not before jobs of its own queue that came earlier: a tenant's order is kept.
            return self._tenants[oldest.tenant].jobs[oldest.kind][0]
        backward, forward = self._lowest(Kind.BACKWARD), self._lowest(Kind.FORWARD)
        if backward is None and forward is None:
            return None
        if forward is None or (backward is not None and backward.counter <= forward.counter):
            assert backward is not None
            return backward.jobs[Kind.BACKWARD][0]
        return forward.jobs[Kind.FORWARD][0]

    def _take(self, job: Job) -> None:
        """A job leaves its queue for a batch, and its tenant is charged what it is expected to take."""
        tenant = self._tenants[job.tenant]
        assert tenant.jobs[job.kind].popleft() is job
        self._forget(job)
        self._floor = tenant.counter
        self._add_to_counter(tenant, job.cost_seconds / tenant.weight)

    def _forget(self, job: Job) -> None:
        del self._queued[job.key]
        self._backlog_seconds -= job.cost_seconds

    def _add_to_counter(self, tenant: _Tenant, amount: float) -> None:
        tenant.counter += amount
        for kind in Kind:
            if tenant.jobs[kind]:
                self._push(kind, tenant)

    def _push(self, kind: Kind, tenant: _Tenant) -> None:
        heappush(self._order[kind], (tenant.counter, next(self._ties), tenant))

    def _lowest(self, kind: Kind) -> _Tenant | None:
        """The tenant with a job of this kind and the lowest counter; it stays in the order."""
        order = self._order[kind]
        while order:
            counter, _, tenant = order[0]
            if counter == tenant.counter and tenant.jobs[kind]:
                return tenant
            heappop(order)
        return None

    def _pop_lowest(self, kind: Kind) -> _Tenant | None:
        tenant = self._lowest(kind)
        if tenant is not None:
            heappop(self._order[kind])
        return tenant

    def _lowest_counter(self) -> float:
        lowest = [tenant.counter for kind in Kind if (tenant := self._lowest(kind)) is not None]
        return min(lowest, default=self._floor)
