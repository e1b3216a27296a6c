"""Autograd function that runs one batch through the remote trunk, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache

from zsl.client.crossing import Crossing
from zsl.client.gradient_sum import MicroBatch, Summand
from zsl.client.overlap import Deferred, Lane
from zsl.client.replayable_step import Answer, CallAdapter, Step, read_answer
from zsl.client.revealed import check_shapes
from zsl.client.trunk_cache import Piece, edit_of, note_forward, trunk_cache_of
from zsl.client.trunk_client import TrunkClient
from zsl.errors import InternalError
from zsl.wire.messages import Reveal

CrossingEvent = tuple[Literal["forward", "backward"], Literal["begins", "ended"]]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the trunk. `exact`: the gradient is the trunk's own; otherwise it passes unchanged.

    `adapter`: the one on the trunk's layers. Its flat `weights` `[elements]` are given for their gradient only.
    `micro_batch`: the one whose step sums up the adapter's gradients at the daemon. `reveal`: tensors from inside the
    trunk to return too, in this order.
    `on_crossing` is called when a batch is ready to be sent and when it has come back, forward and backward.
    """

    client: TrunkClient
    crossing: Crossing
    exact: bool
    on_crossing: Callable[[CrossingEvent], None]
    adapter: CallAdapter | None = None
    micro_batch: MicroBatch | None = None
    reveal: tuple[Reveal, ...] = ()

    def without_gradient(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run activations `[rows, tokens, hidden]` through the trunk, without a backward. Return the output and what
        is revealed."""
        _, results = self._forward(hidden_states, keep=False)
        return results

    def with_gradient(self, hidden_states: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Run activations `[rows, tokens, hidden]` through the trunk, as an operation of autograd. Return the output
        and what is revealed."""
        results: tuple[torch.Tensor, ...]
        results = _TrunkFunction.apply(hidden_states, weights, self)  # type: ignore[no-untyped-call]
        return results

    def behind(self, cache: Cache, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run new tokens `[rows, tokens, hidden]` behind those of a cache, without a backward. Return the output and
        what is revealed."""
        cut = self.client.welcome.cut
        activations = self.crossing.sent(hidden_states.detach())
        piece = Piece(activations.clone(), self.crossing.position_ids, self.adapter)
        of_trunk, edit = trunk_cache_of(cache, cut), edit_of(cache, cut)
        with self._noted("forward"):
            sent = of_trunk.forward(self.client, piece, self.crossing.attention_mask, edit, self.reveal)
            results = self._results(*sent, hidden_states)
        note_forward(cache, cut, hidden_states)
        return results

    def _results(self, output: torch.Tensor, answer: Answer, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the output of a batch, as it came back, and what its answer reveals."""
        output, revealed = self.crossing.received(output, hidden_states), answer.revealed
        check_shapes(revealed, hidden_states, self.client.welcome.cut)
        return (output, *(revealed[name].to(output) for name in self.reveal))

    def _forward(self, hidden_states: torch.Tensor, *, keep: bool) -> tuple[Step, tuple[torch.Tensor, ...]]:
        activations = self.crossing.sent(hidden_states.detach())
        with self._noted("forward"):
            step = self.crossing.forward(self.client, activations, keep=keep, adapter=self.adapter, reveal=self.reveal)
            assert step.answer is not None
            return step, self._results(step.output, step.answer, hidden_states)

    def in_lane(self, lane: Lane[Any], hidden_states: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Run one of several overlapped micro-batches. Return a leaf, whose gradient is sent to the trunk later."""
        crossing, client = self.crossing, self.client
        trained = weights is not None and weights.requires_grad
        summand: Summand | None = None
        lane.check_not_given_up()
        step, future = crossing.submit_forward(
            client, crossing.sent(hidden_states.detach()), keep=self.exact, adapter=self.adapter
        )
        lane.wait(future, client.longest_wait_seconds)
        client.finish_forward(step, client.wait(future))
        output = crossing.received(step.output, hidden_states).requires_grad_()

        def submit(gradients: torch.Tensor) -> Future[Any]:
            crossing.check_gradients(gradients)
            if not self.exact:
                passed: Future[Any] = Future()
                passed.set_result(gradients)
                return passed
            sent = crossing.sent(gradients)
            if self.micro_batch is None or weights is None or not trained:
                return client.submit_backward(step, sent, adapter_gradients=trained)
            nonlocal summand
            summand = self._submit_to_sum(step, sent, crossing.sent(hidden_states.detach()), weights)
            return summand.future

        def finish(message: Future[Any]) -> None:
            if not self.exact:
                hidden_states.backward(message.result())
                return
            if summand is not None:
                read = summand.answer(message)
            else:
                read = read_answer(message.result(), "gradients", adapter_gradients=trained)
            inputs, at_inputs = [], []
            if hidden_states.requires_grad:
                inputs.append(hidden_states)
                at_inputs.append(crossing.received(read.tensor, hidden_states))
            if weights is not None and trained and (summand is None or summand.closes):
                inputs.append(weights)
                at_inputs.append(_received(read, weights.shape, weights.dtype, weights.device))
            torch.autograd.backward(inputs, at_inputs)

        lane.deferred.append(Deferred(output, submit, finish))
        return output

    def _submit_to_sum(
        self, step: Step, gradients: torch.Tensor, activations: torch.Tensor, weights: torch.Tensor
    ) -> Summand:
        """Send a backward whose adapter gradients are added to the sum of its step."""
        assert self.micro_batch is not None
        of = self.micro_batch.sums.of(self.client, step)
        return of.submit(step, gradients, activations, weights, closes=self.micro_batch.is_last)

    @contextmanager
    def _noted(self, direction: Literal["forward", "backward"]) -> Iterator[None]:
        self.on_crossing((direction, "begins"))
        yield
        self.on_crossing((direction, "ended"))


class _TrunkFunction(torch.autograd.Function):
    """Trunk as an operation of autograd on activations and the flat weights of its adapter.

    The activations are saved by autograd, so `retain_graph`, a second backward and the freeing of memory work as for
    any other operation. The step keeps the version of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weights: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)  # revealed tensors that have no gradient send none
        step, results = call._forward(hidden_states, keep=call.exact)
        if call.exact:
            ctx.save_for_backward(hidden_states)
            step.forget_tensors()
            ctx.step = step
            ctx.flat = None if weights is None else (weights.shape, weights.dtype, weights.device)
            ctx.weights = weights if call.micro_batch is not None else None
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradients: torch.Tensor | None, *of_revealed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        call: Call = ctx.call
        if gradients is None:  # of a loss on revealed tensors only
            gradients = torch.zeros_like(ctx.saved_tensors[0])
        call.crossing.check_gradients(gradients)
        if not call.exact:
            call.on_crossing(("backward", "ended"))
            return gradients, None, None
        (hidden_states,) = ctx.saved_tensors
        to_input, to_weights = ctx.needs_input_grad[:2]
        sent, activations = call.crossing.sent(gradients), call.crossing.sent(hidden_states.detach())
        at_revealed = {
            name: call.crossing.sent(gradient)
            for name, gradient in zip(call.reveal, of_revealed, strict=True)
            if gradient is not None
        }
        with call._noted("backward"):
            if call.micro_batch is not None and to_weights:
                summand = call._submit_to_sum(ctx.step, sent, activations, ctx.weights)
                wait([summand.future], call.client.longest_wait_seconds)
                answer, to_weights = summand.answer(summand.future), summand.closes
            else:
                answer = call.client.backward(
                    ctx.step,
                    sent,
                    activations=activations,
                    adapter_gradients=to_weights,
                    at_revealed=at_revealed,
                )
            return (
                call.crossing.received(answer.tensor, hidden_states) if to_input else None,
                _received(answer, *ctx.flat) if to_weights else None,
                None,
            )


def _received(answer: Answer, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the adapter's gradient like its weights. Raises `InternalError` for a wrong shape."""
    found = answer.adapter_gradients
    if found is None or found.shape != shape:
        raise InternalError(f"the trunk answered with adapter gradients of another shape than {tuple(shape)}")
    return found.to(device, dtype)
