"""Overlap the micro-batches of one step: the client computes one while others wait for the trunk.

Each micro-batch has its own thread, but only one thread runs at a time: it yields where it would wait for the trunk.
Micro-batches pass the bottom, the trunk and the top in their order, so that gradients are summed in the order, and with
the bits, of a run without overlap.

Each has its own random number state, so that dropout does not depend on which answer came first. Its random numbers
differ from those without overlap.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from zsl.client.gradient_sum import StepSums, micro_batch
from zsl.errors import InternalError

logger = logging.getLogger(__name__)

GIVE_UP_SECONDS = 5.0  # for all micro-batches of a step that failed
RETRY_SECONDS = 0.5  # delay of one that catches the exception and calls the trunk again

T = TypeVar("T")

_local = threading.local()


def current_lane() -> Lane[Any] | None:
    """Return the micro-batch that this thread runs; None outside of overlap."""
    return getattr(_local, "lane", None)


class _GivenUp(BaseException):
    """Ends the thread of a micro-batch whose step has failed."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """Forward whose backward is still pending. `output` is a leaf of the top's graph."""

    output: torch.Tensor
    submit: Callable[[torch.Tensor], Future[Any]]  # sends the gradient at the output
    finish: Callable[[Future[Any]], None]  # runs the bottom's backward with the answer


class Lane(Generic[T]):
    """One micro-batch and its thread. `resume` lets it run until it waits for the trunk or has ended.

    `seed`: seed of its random numbers. `drew`: True if it has drawn any.
    """

    def __init__(self, task: Callable[[], T], seed: int) -> None:
        self.drew = False
        self._seed = seed
        self._random_states: list[torch.Tensor] | None = None
        self.waits_for: Future[Any] | None = None
        self.longest_wait_seconds = 0.0  # for the trunk, forward or backward
        self.deferred: list[Deferred] = []
        self.result: Future[T] = Future()
        self._task = task
        # Tokens. (A semaphore has a lock of Python's own, which Ctrl-C may leave taken.)
        self._run: SimpleQueue[None] = SimpleQueue()
        self._ran: SimpleQueue[None] = SimpleQueue()
        self._given_up = False
        self._thread = threading.Thread(target=self._main, name="zsl-micro-batch", daemon=True)

    def resume(self) -> None:
        """Run the micro-batch until it waits for `waits_for`, or `result` is set."""
        self.waits_for = None
        if self._thread.ident is None:
            self._thread.start()
        others = _random_states()
        if self._random_states is None:
            torch.manual_seed(self._seed)
        else:
            _set_random_states(self._random_states)
        before = _random_states()
        self._run.put(None)
        self._ran.get()
        self._random_states = _random_states()
        self.drew |= not all(map(torch.equal, before, self._random_states))
        _set_random_states(others)

    def wait(self, future: Future[Any], longest_wait_seconds: float) -> None:
        """Let other micro-batches run until the future is done. Called in this lane's thread."""
        self.check_not_given_up()
        self.waits_for = future
        self.longest_wait_seconds = longest_wait_seconds
        self._ran.put(None)
        self._run.get()
        if self._given_up:
            future.cancel()
            raise _GivenUp

    def check_not_given_up(self) -> None:
        """Raise, after a delay, if the lane was given up. Called in its thread before each request to the trunk."""
        if self._given_up:
            time.sleep(RETRY_SECONDS)
            raise _GivenUp

    def give_up(self) -> None:
        """End the micro-batch where it waits, or at its next request to the trunk. `join` waits for that."""
        self._given_up = True
        self._run.put(None)

    def join(self, seconds: float) -> None:
        """Wait for a lane that was given up, for a bounded time, because its code may catch every exception."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                logger.warning("a micro-batch goes on after its step has failed: it catches every exception")

    def _main(self) -> None:
        _local.lane = self
        self._run.get()
        try:
            if not self._given_up:
                self.result.set_result(self._task())
        except _GivenUp:
            pass
        except BaseException as error:
            self.result.set_exception(error)
        finally:
            self._ran.put(None)


@dataclass(slots=True)
class _Returning(Generic[T]):
    """Micro-batch whose top is done and whose backward in the trunk is pending."""

    lane: Lane[T]
    answers: list[tuple[Deferred, Future[Any]]] = field(default_factory=list)


def run_overlapped(tasks: Sequence[Callable[[], T]], *, in_flight: int) -> list[T]:
    """Run tasks, each the forward and backward of one micro-batch, at most `in_flight` at a time. Return their results.

    An error of one task, or Ctrl-C, ends all tasks, is raised, and restores the random number states. The gradients of
    adapters on the trunk's layers are summed up at the daemon.
    """
    sums = StepSums()
    waiting: deque[Lane[T]] = deque()  # for the trunk's forward, in order
    returning: deque[_Returning[T]] = deque()  # for its backward, in order
    results: list[T] = []
    summed = [partial(_summed, task, sums, is_last=number == len(tasks)) for number, task in enumerate(tasks, 1)]
    upcoming = deque(zip(summed, _seeds(), strict=False))
    drew = False
    before = _random_states()
    try:
        while upcoming or waiting or returning:
            if upcoming and len(waiting) + len(returning) < in_flight:
                waiting.append(Lane(*upcoming.popleft()))
                waiting[-1].resume()
                if waiting[-1].result.done():
                    waiting[-1].result.result()  # raise an error without waiting for earlier micro-batches
            elif returning and all(answer.done() for _, answer in returning[0].answers):
                _finish(returning[0])
                ended = returning.popleft().lane
                drew |= ended.drew
                results.append(ended.result.result())
            elif waiting and (waiting[0].waits_for is None or waiting[0].waits_for.done()):
                lane = waiting[0]
                if lane.waits_for is not None:
                    lane.resume()
                if lane.result.done():
                    returning.append(_turned_back(lane))
                    waiting.popleft()
            else:
                _wait_for_any(waiting, returning)
    except BaseException:
        try:
            _give_up(waiting, returning)
        finally:
            _set_random_states(before)
        raise
    sums.close()
    if drew:
        torch.rand(())  # so that the next step draws other numbers
    return results


def _summed(task: Callable[[], T], sums: StepSums, *, is_last: bool) -> T:
    with micro_batch(sums, is_last=is_last):
        return task()


def _seeds() -> Iterator[int]:
    """Yield a seed for each micro-batch of a step, hashed from the random number state, which stays unchanged: a step
    that draws no numbers leaves it as it would without overlap."""
    state = torch.get_rng_state().numpy().tobytes()
    for number in count():
        digest = hashlib.sha256(state + number.to_bytes(8, "little")).digest()
        yield int.from_bytes(digest[:8], "little", signed=True)


def _random_states() -> list[torch.Tensor]:
    """Return the random number states of the CPU and of all GPUs, if CUDA is initialized."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _set_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


def _give_up(waiting: deque[Lane[Any]], returning: deque[_Returning[Any]]) -> None:
    """End the unfinished micro-batches, in bounded time."""
    for one in returning:
        for _, answer in one.answers:
            answer.cancel()
    for lane in waiting:
        lane.give_up()
    until = time.monotonic() + GIVE_UP_SECONDS
    for lane in waiting:
        lane.join(max(0.0, until - time.monotonic()))


def _turned_back(lane: Lane[T]) -> _Returning[T]:
    """Send the gradients at the trunk's output. Raises the micro-batch's error, if it failed."""
    lane.result.result()
    answers = []
    for deferred in reversed(lane.deferred):
        if deferred.output.grad is not None:
            answers.append((deferred, deferred.submit(deferred.output.grad)))
    return _Returning(lane, answers)


def _finish(returning: _Returning[Any]) -> None:
    for deferred, answer in returning.answers:
        deferred.finish(answer)


def _wait_for_any(waiting: deque[Lane[Any]], returning: deque[_Returning[Any]]) -> None:
    """Wait for the next answer that lets a micro-batch go on. Bounded, even if the connection has dropped it."""
    lanes = [*list(waiting)[:1], *(one.lane for one in list(returning)[:1])]
    futures = [lane.waits_for for lane in list(waiting)[:1] if lane.waits_for is not None]
    if returning:
        futures += [answer for _, answer in returning[0].answers if not answer.done()]
    longest_wait_seconds = max(lane.longest_wait_seconds for lane in lanes)
    done, _ = wait(futures, longest_wait_seconds, FIRST_COMPLETED)
    if not done:
        raise InternalError(f"the trunk's connection did not end a request within {longest_wait_seconds:g} s")
