"""In which order requests are computed, and which of them together. Pure: no clock, no sockets, no torch.

Work-conserving: whenever the device is free, the oldest request goes, and those that can share its pass go with
it. Only small requests are merged (below the knee a pass costs nearly the same with more tokens in it); large
ones gain nothing and run alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """A queued request, as far as ordering needs to know it.

    `merge_key`: jobs with equal keys can share a pass; None runs alone. `deadline`: seconds on the caller's clock.
    """

    key: Hashable
    tokens: int  # rows x tokens
    merge_key: Hashable | None
    deadline: float


class Scheduler:
    """A queue of jobs. `max_batch_tokens` bounds a merged pass; a larger single job still runs, alone."""

    def __init__(self, *, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Queue a job. A key that is queued already keeps its place."""
        self._jobs.setdefault(job.key, job)

    def discard(self, key: Hashable) -> bool:
        """Take a job out; whether it was there."""
        return self._jobs.pop(key, None) is not None

    def take_expired(self, now: float) -> list[Job]:
        """Take out the jobs whose deadline has passed."""
        expired = [job for job in self._jobs.values() if job.deadline <= now]
        for job in expired:
            del self._jobs[job.key]
        return expired

    def take_batch(self) -> list[Job]:
        """Take the jobs of the next pass: the oldest, and those that merge with it. Empty if nothing is queued."""
        if not self._jobs:
            return []
        first = next(iter(self._jobs.values()))
        batch, tokens = [first], first.tokens
        if first.merge_key is not None:
            for job in self._jobs.values():
                fits = tokens + job.tokens <= self._max_batch_tokens
                if job is not first and job.merge_key == first.merge_key and fits:
                    batch.append(job)
                    tokens += job.tokens
        for job in batch:
            del self._jobs[job.key]
        return batch
