"""Batch runner: run batches on the compute thread, answer their requests, and end those past their deadline.

Whenever the device is free, the next batch is sent to the compute thread. Model code never runs on the loop, which
answers pings while the device is busy. Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zsl.errors import DeadlineError, WireError
from zsl.trunk.compute.worker import Finished, Worker
from zsl.trunk.failpoints import Failpoint
from zsl.trunk.malloc import TrimPolicy
from zsl.trunk.requests.answers import Answers, PassTimes
from zsl.trunk.requests.request_table import Request, RequestState, RequestTable
from zsl.trunk.work import Alone, Batch, Compute, Keep, Outcome, Work
from zsl.wire.messages import Backward

_NEVER_RAN = PassTimes(merged=1, started=0.0, ended=0.0)


class BatchRunner:
    """Runs batches from the table of requests, one at a time, and answers their requests."""

    def __init__(
        self,
        compute: Compute,
        requests: RequestTable,
        answers: Answers,
        trim_policy: TrimPolicy,
        *,
        stash_memory_bytes: int,
        clock: Callable[[], float],
        failpoint: Failpoint | None,
    ) -> None:
        self._traits = compute.traits
        self._requests = requests
        self._sessions = requests.sessions
        self._router = answers.router
        self._answers = answers
        self._trim_policy = trim_policy
        self._stash_memory_bytes = stash_memory_bytes
        self._clock = clock
        self._worker: Worker[Request] = Worker(compute, self._finish_batch, clock=clock, failpoint=failpoint)
        self._step_later: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """True while a pass runs."""
        return self._worker.busy_since is not None

    def busy_seconds(self, now: float) -> float:
        """Return the seconds since the running pass began; 0 while idle."""
        return self._worker.busy_seconds(now)

    def step(self) -> None:
        """Run the next batch if the device is free. Call it after all arrived messages are handled."""
        if self.is_busy:
            return
        if self._step_later is not None:
            self._step_later.cancel()
            self._step_later = None
        now = self._clock()
        self.end_expired(now)
        requests = self._requests.take_batch(now)
        if requests:
            self._worker.give(requests, self._batch(requests))
        elif self._requests.waits_until is not None:
            loop = asyncio.get_running_loop()
            self._step_later = loop.call_later(self._requests.waits_until - now, self.step)

    def end_expired(self, now: float) -> None:
        """Answer queued requests past their deadline with `DeadlineError`."""
        for request in self._requests.expired(now):
            self.end(request, DeadlineError())

    def end(self, request: Request, outcome: Outcome, times: PassTimes = _NEVER_RAN) -> None:
        """End a request, and answer it unless its session was closed meanwhile."""
        session = request.session
        if request.state is RequestState.ABANDONED:
            self._requests.end(request, outcome)
        elif isinstance(outcome, WireError):
            self._requests.end(request, outcome)
            self._answers.send_error(session.peer, outcome, request=request.header.request, session=session.id)
        else:
            frames = self._answers.result(request, outcome, times)
            self._requests.end(request, outcome, frames)
            if not self._router.send(session.peer, frames):
                # Disconnected, or not reading. Its session lives until its lease ends, so the client can ask again.
                self._router.cut(session.peer)

    async def stop(self, seconds: float) -> bool:
        """Stop after the running pass. False if that takes longer than `seconds`."""
        if self._step_later is not None:
            self._step_later.cancel()
        return await self._worker.stop(seconds)

    def _batch(self, requests: list[Request]) -> Batch:
        room = self._make_room(requests)
        by_layers = not room and any(_makes_graph(request) for request in requests)
        return Batch(tuple(self._work(request, room) for request in requests), by_layers)

    def _make_room(self, requests: list[Request]) -> bool:
        """Evict stashes to make room for the graph of a pass. If there is none for it, make room for a pass layer by
        layer, and return False."""
        lengths = [length for request in requests for length in request.shape.lengths]
        taken = self._requests.taken_bytes
        graph_memory, pass_memory = self._traits.memory_of(request.adapter for request in requests)
        graph = graph_memory.nbytes(lengths)
        # Of other backwards: the graph of these takes the place of what their forwards kept.
        taken_graphs = self._requests.taken_graph_bytes - sum(request.taken_graph_bytes for request in requests)
        if (
            any(request.keep or _makes_graph(request) for request in requests)
            and (
                any(request.reveals and not request.keep for request in requests)  # not possible layer by layer
                or self._sessions.fits_graph(graph, taken_bytes=taken_graphs, alone=len(requests) == 1)
            )
            and self._sessions.make_room(graph + taken)
        ):
            return True
        needed = pass_memory.nbytes(lengths, all_inputs=graph <= self._stash_memory_bytes) + taken
        self._sessions.make_room(min(needed, self._stash_memory_bytes - 1))
        return False

    def _work(self, request: Request, room: bool) -> Work:
        stash = request.held.stash if request.held else None
        keep = self._keep(request, room)
        return Work(
            request.kind,
            request.buffers,
            request.shape,
            request.sharing,
            keep,
            stash,
            request.adapter,
            request.reveals,
            request.cache,
        )

    def _keep(self, request: Request, room: bool) -> Keep:
        """Choose the part of a forward to keep. `room`: the graph of its pass fits in memory.

        A backward can use the graph only with all requests of its forward; in other batches it needs linear outputs."""
        if not request.keep:
            return Keep.NOTHING
        if not room:
            return Keep.INPUT
        if request.sharing == Alone():
            return Keep.GRAPH
        return Keep.LINEAR_OUTPUTS if self._traits.deterministic else Keep.GRAPH_AND_LINEAR_OUTPUTS

    def _finish_batch(self, batch: Finished[Request]) -> None:
        self._trim_policy.freed(self._clock())
        self._requests.charge(batch.tickets, batch.ended - batch.started, self._clock())
        for request, outcome in zip(batch.tickets, batch.outcomes, strict=True):
            self._requests.settle(request, outcome)
        self._router.drain()  # requests that arrived meanwhile can merge into the next pass, which begins here
        times = PassTimes(len(batch.tickets), batch.started, batch.ended)
        for request, outcome in zip(batch.tickets, batch.outcomes, strict=True):
            self.end(request, outcome, times)


def _makes_graph(request: Request) -> bool:
    """Return whether this is a backward without the graph of its forward."""
    return isinstance(request.header, Backward) and (request.held is None or not request.held.stash.keep.has_graph)
