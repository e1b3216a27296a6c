"""Sum an adapter's gradients over the micro-batches of a step at the daemon, so that they cross once a step.

The sum there is a cache. The client keeps what it has sent, and sends it again, in order, if the daemon has lost it:
the result is the local sum bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch

from zsl.client.replayable_step import Answer, Step, read_answer
from zsl.client.trunk_client import TrunkClient
from zsl.errors import UnknownSumError
from zsl.wire.frames import Message
from zsl.wire.messages import AdapterSum

MAX_RESTARTS = 5  # of one sum, by daemons that lose it

_names = count(1)
_local = threading.local()


@dataclass(frozen=True, slots=True)
class _Member:
    """One backward of a sum, as it was sent."""

    step: Step
    gradients: torch.Tensor
    activations: torch.Tensor


class GradientSum:
    """Sum of the gradients of one adapter version at one daemon. Its members are backwards, in their order.

    `closed`: the last member has asked for the sum.
    """

    def __init__(self, client: TrunkClient) -> None:
        self._client = client
        self._members: list[_Member] = []
        self._weights: torch.Tensor | None = None  # of the last member, with autograd's graph
        self._first_name = self._name = next(_names)
        self._summed = 0  # members that were sent again, and are in the sum of that name
        self.closed = False

    def submit(
        self, step: Step, gradients: torch.Tensor, activations: torch.Tensor, weights: torch.Tensor, *, closes: bool
    ) -> Summand:
        """Send a backward, to be added to the sum; if it closes the sum, its answer has it.

        `gradients`, `activations`: as they are sent. `weights`: flat, of the step's forward.
        """
        position = len(self._members)
        self._members.append(_Member(step, gradients, activations))
        self._weights, self.closed = weights, closes
        asked = AdapterSum(name=self._name, position=position)
        future = self._client.submit_backward(
            step, gradients, activations=activations, adapter_sum=asked, adapter_gradients=closes
        )
        return Summand(self, position, closes, future)

    def close(self) -> None:
        """Fetch a sum that no member has asked for, and add it to the gradients of its parameters."""
        if self.closed or self._weights is None:
            return
        self.closed = True
        self._start_over()
        total = self.send_again(len(self._members) - 1).adapter_gradients
        assert total is not None
        torch.autograd.backward([self._weights], [total.to(self._weights)])

    def send_again(self, position: int) -> Answer:
        """Send members again, up to a position, for a new sum.

        Raises `UnknownSumError` if daemons lose it too often.
        """
        if self._name == self._first_name:
            self._start_over()
        for _ in range(MAX_RESTARTS):
            try:
                answer = self._send_next()
                while self._summed <= position:
                    answer = self._send_next()
                return answer
            except UnknownSumError:
                self._start_over()
        raise UnknownSumError(f"daemons lost the sum of a step's gradients {MAX_RESTARTS} times")

    def _start_over(self) -> None:
        self._name, self._summed = next(_names), 0

    def _send_next(self) -> Answer:
        member, is_last = self._members[self._summed], self._summed == len(self._members) - 1
        answer = self._client.backward(
            member.step,
            member.gradients,
            activations=member.activations,
            adapter_sum=AdapterSum(name=self._name, position=self._summed),
            adapter_gradients=is_last and self.closed,
        )
        self._summed += 1
        return answer


@dataclass(frozen=True, slots=True)
class Summand:
    """A backward that was sent to be added to a sum. `closes`: its answer has the sum."""

    of: GradientSum
    position: int
    closes: bool
    future: Future[Message]

    def answer(self, message: Future[Message]) -> Answer:
        """Return the answer in a message, or that of a new sum if the daemon has lost this one."""
        try:
            return read_answer(message.result(), "gradients", adapter_gradients=self.closes)
        except UnknownSumError:
            return self.of.send_again(self.position)


@dataclass(slots=True)
class StepSums:
    """Sums of one optimizer step, by daemon and adapter version."""

    _newest: dict[tuple[int, bytes], GradientSum] = field(default_factory=dict)

    def of(self, client: TrunkClient, step: Step) -> GradientSum:
        """Return the sum for a backward: the open one, or a new one."""
        assert step.adapter is not None
        key = id(client), step.adapter.version.digest
        found = self._newest.get(key)
        if found is None or found.closed:
            found = self._newest[key] = GradientSum(client)
        return found

    def close(self) -> None:
        """Fetch the sums that no micro-batch has asked for."""
        for one in self._newest.values():
            one.close()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Place of a forward in its step: the first backward of the last micro-batch closes the sum."""

    sums: StepSums
    is_last: bool


def current_micro_batch() -> MicroBatch | None:
    """Return the micro-batch that this thread runs; None if adapter gradients come back with each backward."""
    return getattr(_local, "micro_batch", None)


@contextmanager
def micro_batch(sums: StepSums, *, is_last: bool) -> Iterator[None]:
    """Let the forwards of this thread be of a micro-batch of a step, whose adapter gradients are summed up."""
    before = current_micro_batch()
    _local.micro_batch = MicroBatch(sums, is_last)
    try:
        yield
    finally:
        _local.micro_batch = before
