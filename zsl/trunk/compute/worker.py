"""Compute thread: run one batch at a time, and report to the loop. Imports no sockets and no torch."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from zsl.errors import InternalError
from zsl.trunk.failpoints import Failpoint
from zsl.trunk.work import Batch, Compute, Outcome

logger = logging.getLogger(__name__)

Ticket = TypeVar("Ticket")


@dataclass(frozen=True, slots=True)
class Finished(Generic[Ticket]):
    """A completed batch: an outcome per ticket, and its start and end (seconds, monotonic)."""

    tickets: list[Ticket]
    outcomes: Sequence[Outcome]
    started: float
    ended: float


class Worker(Generic[Ticket]):
    """Runs `compute` in its own thread. Calls `finished` on the loop that created it."""

    def __init__(
        self,
        compute: Compute,
        finished: Callable[[Finished[Ticket]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        failpoint: Failpoint | None = None,
    ) -> None:
        self._failpoint = failpoint or Failpoint()
        self._compute = compute
        self._finished = finished
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._batches: SimpleQueue[tuple[list[Ticket], Batch] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="zsl-compute", daemon=True)
        self._thread.start()
        self.busy_since: float | None = None

    def give(self, tickets: list[Ticket], batch: Batch) -> None:
        """Run a batch, with one ticket per work. Only while idle (`busy_since` is None)."""
        self.busy_since = self._clock()
        self._batches.put((tickets, batch))

    def busy_seconds(self, now: float) -> float:
        """Return the seconds since the running pass began; 0 while idle."""
        return 0.0 if self.busy_since is None else now - self.busy_since

    async def stop(self, seconds: float) -> bool:
        """End the thread after the running pass. False if that takes longer than `seconds`."""
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (given := self._batches.get()) is not None:
            tickets, batch = given
            del given  # else the batch's memory would live until the next one
            kind = batch.kind.value
            self._failpoint.visit(f"before-{kind}")
            started = self._clock()
            try:
                outcomes: Sequence[Outcome] = self._compute.run(batch)
            except BaseException:
                logger.exception("the compute thread failed")
                outcomes = [InternalError()] * len(tickets)
            del batch
            self._failpoint.visit(f"after-{kind}")
            finished = Finished(tickets, outcomes, started, self._clock())
            self._loop.call_soon_threadsafe(self._finish, finished)
            del tickets, outcomes, finished

    def _finish(self, finished: Finished[Ticket]) -> None:
        self.busy_since = None
        self._finished(finished)
