"""Scheduler of requests: orders queued jobs by fair share, and merges them into batches. Pure.

- When the device is free, a queued job runs. There is no batching window; a pass is delayed only if
  jobs that could merge are expected so soon that they save more than the delay costs
  (`zsl.trunk.scheduling.anticipation`), and not while there is work of both classes.
- Two classes of work share the device: decoding and training (`zsl.trunk.scheduling.jobs`). Each has a virtual time,
  its used device time divided by its share. The class with the lower one runs next; one that was idle is raised to the
  virtual time at which the last pass started, so that idling saves up nothing. This is start-time fair queueing (Goyal,
  Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996). While both have jobs, their virtual times differ by a pass of
  each at most. While one has none, the other has the whole device.
- Within a class the tenant that has used least is next, and within a tenant the kinds have an order
  (`zsl.trunk.scheduling.fair_queue`).
- Small jobs of one kind share a pass up to a budget of tokens, taken in the order of fairness.
- Aging: one batch in `AGED_BATCH_EVERY` serves the longest-waiting tenant that had no batch for `max_wait_seconds`,
  regardless of counters. So a stream of new tenants cannot starve one, and under overload fairness still decides.

No sockets, no torch; time is an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from zsl.trunk.costs import UNKNOWN_COSTS, Costs
from zsl.trunk.scheduling.anticipation import Anticipation
from zsl.trunk.scheduling.fair_queue import FairQueue
from zsl.trunk.scheduling.jobs import KINDS, Job, WorkClass
from zsl.trunk.work import Kind

AGED_BATCH_EVERY = 8


@dataclass(slots=True)
class _Class:
    share: float
    jobs: FairQueue
    virtual_time: float = 0.0  # used device time / share, expected time of a running pass included


class Scheduler:
    """Queue of jobs. `max_batch_tokens` bounds a merged pass; a larger single job runs alone.

    `decode_share`: part of the device's time that decoding gets while training waits too, between 0 and 1.
    `costs`: of the trunk; if unknown, no pass is delayed.
    `waits_until`: the time to call `take_batch` again if no job arrives before; None unless it delays a queued job.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int,
        max_wait_seconds: float = 10.0,
        decode_share: float = 0.5,
        costs: Costs = UNKNOWN_COSTS,
    ) -> None:
        self.waits_until: float | None = None
        self._waits_since: float | None = None
        self._anticipation = Anticipation(costs)
        self._queued_tokens: Counter[tuple[Kind, Hashable]] = Counter()
        self._queued_jobs: Counter[tuple[Kind, Hashable]] = Counter()
        self._max_batch_tokens = max_batch_tokens
        self._max_wait_seconds = max_wait_seconds
        shares = {WorkClass.DECODING: decode_share, WorkClass.TRAINING: 1 - decode_share}
        self._classes = {
            work_class: _Class(share, FairQueue([kind for kind in KINDS if KINDS[kind].work_class is work_class]))
            for work_class, share in shares.items()
        }
        self._virtual_time = 0.0  # of the class that was last served, when its pass started
        self._queued: dict[Hashable, Job] = {}
        self._queued_of: Counter[Hashable] = Counter()  # by client
        self._backlog_seconds = 0.0
        self._deadlines: list[tuple[float, int, Job]] = []
        self._ties = count()
        self._batches = 0

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
        of_class = self._classes[job.work_class]
        if not of_class.jobs:
            of_class.virtual_time = max(of_class.virtual_time, self._virtual_time)
        of_class.jobs.add(job, now, weight)
        self._queued[job.key] = job
        self._backlog_seconds += job.cost_seconds
        self._queued_tokens[job.kind, job.merge_key] += job.tokens
        self._queued_jobs[job.kind, job.merge_key] += 1
        self._queued_of[job.comes_from] += 1
        self._anticipation.arrived(job.comes_from, job.kind, job.merge_key, job.tokens, now)
        self._note_deadline(job)

    def discard(self, key: Hashable) -> bool:
        """Remove a queued job. False if its key is unknown."""
        job = self._queued.get(key)
        if job is None:
            return False
        self._classes[job.work_class].jobs.discard(job)
        self._forget(job)
        return True

    def forget_client(self, client: Hashable) -> None:
        """Forget a closed client."""
        self._anticipation.forget(client)

    def forget_tenant(self, tenant: Hashable) -> None:
        """Forget a tenant and its counters. Its jobs must have been discarded."""
        self._anticipation.forget(tenant)
        for of_class in self._classes.values():
            of_class.jobs.forget(tenant)

    def take_expired(self, now: float) -> list[Job]:
        """Remove and return the jobs past their deadline."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, job = heappop(self._deadlines)
            if self._queued.get(job.key) is job:
                self.discard(job.key)
                expired.append(job)
        return expired

    def take_batch(self, now: float, *, frees_graphs: bool = False) -> list[Job]:
        """Remove and return the jobs of the next pass, all of one kind. Empty if none is queued, or while delayed.

        `frees_graphs`: jobs that free a graph go first.
        """
        first = self._first(now, frees_graphs)
        self.waits_until = None if first is None else self._delay_until(first, now)
        if self.waits_until is not None and all(of_class.jobs for of_class in self._classes.values()):
            # While one class waits to merge, the other would wait for nothing. Passes of decoding are short.
            self.waits_until, first = None, self._classes[WorkClass.DECODING].jobs.first(frees_graphs)
        if self.waits_until is not None:
            return []
        self._waits_since = None
        if first is None:
            return []
        self._batches += 1
        of_class = self._classes[first.work_class]
        batch = of_class.jobs.take_with_others(first, self._max_batch_tokens, now)
        for job in batch:
            self._forget(job)
            of_class.virtual_time += job.cost_seconds / of_class.share
        return batch

    def charge(self, batch: list[Job], seconds: float, now: float) -> None:
        """Correct the counters after a batch of `seconds`, which its jobs share by their tokens."""
        all_tokens = sum(job.tokens for job in batch)
        self._anticipation.ran(batch[0].kind, all_tokens, seconds)
        for job in batch:
            of_class = self._classes[job.work_class]
            more_seconds = seconds * job.tokens / all_tokens - job.cost_seconds
            of_class.virtual_time += more_seconds / of_class.share
            known = of_class.jobs.charge(job, more_seconds)
            if known and not self._queued_of[job.comes_from]:
                self._anticipation.answered(job.comes_from, job.kind, now)

    def _delay_until(self, first: Job, now: float) -> float | None:
        """Return the time until which to delay this job's pass for jobs that can merge; None if not worthwhile."""
        if first.merge_key is None:
            return None
        alike = first.kind, first.merge_key
        since = now if self._waits_since is None else self._waits_since
        tokens = self._queued_tokens[alike]
        until = self._anticipation.worth_waiting_until(
            *alike,
            now,
            jobs=self._queued_jobs[alike],
            tokens=tokens,
            room_tokens=self._max_batch_tokens - tokens,
            since=since,
        )
        if until is not None:
            self._waits_since = since
        return until

    def _note_deadline(self, job: Job) -> None:
        heappush(self._deadlines, (job.deadline, next(self._ties), job))
        if len(self._deadlines) > 2 * len(self._queued) + 64:  # most entries are stale
            self._deadlines = [entry for entry in self._deadlines if self._queued.get(entry[2].key) is entry[2]]
            heapify(self._deadlines)

    def _first(self, now: float, frees_graphs: bool) -> Job | None:
        """Return the next job: of the class with the lowest virtual time; or of a tenant that has waited too long."""
        if self._batches % AGED_BATCH_EVERY == 0 and (aged := self._aged(now)) is not None:
            return aged
        found = [(each, job) for each in self._classes.values() if (job := each.jobs.first(frees_graphs)) is not None]
        if not found:
            return None
        of_class, job = min(found, key=lambda one: one[0].virtual_time)
        self._virtual_time = max(self._virtual_time, of_class.virtual_time)
        return job

    def _aged(self, now: float) -> Job | None:
        """Return the next job of the longest-waiting tenant, if over `max_wait_seconds`."""
        found = [one for of_class in self._classes.values() if (one := of_class.jobs.longest_waiting()) is not None]
        since, job = min(found, key=lambda one: one[0], default=(now, None))
        return job if now - since >= self._max_wait_seconds else None

    def _forget(self, job: Job) -> None:
        del self._queued[job.key]
        self._queued_of[job.comes_from] -= 1
        if not self._queued_of[job.comes_from]:
            del self._queued_of[job.comes_from]
        self._backlog_seconds -= job.cost_seconds
        alike = job.kind, job.merge_key
        self._queued_tokens[alike] -= job.tokens
        self._queued_jobs[alike] -= 1
        if not self._queued_jobs[alike]:
            del self._queued_tokens[alike], self._queued_jobs[alike]
