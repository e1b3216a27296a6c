"""Autograd function that runs one batch through the remote trunk, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from zsl.client.crossing import Crossing
from zsl.client.overlap import Deferred, Lane
from zsl.client.replayable_step import read_answer
from zsl.client.trunk_client import TrunkClient

CrossingEvent = tuple[Literal["forward", "backward"], Literal["begins", "ended"]]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the trunk. `exact`: the gradient is the trunk's own; otherwise it passes unchanged.

    `on_crossing` is called when a batch is ready to be sent and when it has come back, forward and backward.
    """

    client: TrunkClient
    crossing: Crossing
    exact: bool
    on_crossing: Callable[[CrossingEvent], None]

    def without_gradient(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run activations `[rows, tokens, hidden]` through the trunk, without a backward."""
        activations = self.crossing.sent(hidden_states.detach())
        with self._noted("forward"):
            step = self.crossing.forward(self.client, activations, keep=False)
            return self.crossing.received(step.output, hidden_states)

    def with_gradient(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run activations `[rows, tokens, hidden]` through the trunk, as an operation of autograd."""
        output: torch.Tensor = _TrunkFunction.apply(hidden_states, self)  # type: ignore[no-untyped-call]
        return output

    def in_lane(self, lane: Lane[Any], hidden_states: torch.Tensor) -> torch.Tensor:
        """Run one of several overlapped micro-batches. Return a leaf, whose gradient is sent to the trunk later."""
        crossing, client = self.crossing, self.client
        lane.check_not_given_up()
        step, future = crossing.submit_forward(client, crossing.sent(hidden_states.detach()), keep=self.exact)
        lane.wait(future, client.longest_wait_seconds)
        client.finish_forward(step, client.wait(future))
        output = crossing.received(step.output, hidden_states).requires_grad_()

        def submit(gradients: torch.Tensor) -> Future[Any]:
            crossing.check_gradients(gradients)
            if self.exact:
                return client.submit_backward(step, crossing.sent(gradients))
            passed: Future[Any] = Future()
            passed.set_result(gradients)
            return passed

        def finish(answer: Any) -> None:
            gradients = answer
            if self.exact:
                gradients = crossing.received(read_answer(answer, "gradients").tensor, hidden_states)
            hidden_states.backward(gradients)

        lane.deferred.append(Deferred(output, submit, finish))
        return output

    @contextmanager
    def _noted(self, direction: Literal["forward", "backward"]) -> Iterator[None]:
        self.on_crossing((direction, "begins"))
        yield
        self.on_crossing((direction, "ended"))


class _TrunkFunction(torch.autograd.Function):
    """Trunk as an operation of autograd. Its input is saved by autograd, so `retain_graph`, a second backward and the
    freeing of memory work as for any other operation."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, call: Call) -> torch.Tensor:
        ctx.call = call
        activations = call.crossing.sent(hidden_states.detach())
        with call._noted("forward"):
            step = call.crossing.forward(call.client, activations, keep=call.exact)
            output = call.crossing.received(step.output, hidden_states)
        if call.exact:
            ctx.save_for_backward(hidden_states)
            step.forget_tensors()
            ctx.step = step
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        call: Call = ctx.call
        call.crossing.check_gradients(gradients)
        if not call.exact:
            call.on_crossing(("backward", "ended"))
            return gradients, None
        (hidden_states,) = ctx.saved_tensors
        sent, activations = call.crossing.sent(gradients), call.crossing.sent(hidden_states.detach())
        with call._noted("backward"):
            answer = call.client.backward(ctx.step, sent, activations=activations)
            return call.crossing.received(answer.tensor, hidden_states), None
