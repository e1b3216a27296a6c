"""Keep what the linear layers of a forward gave, so that its backward need not multiply again.

The vector-Jacobian product of a frozen linear layer needs its weight and nothing of the forward; what autograd
keeps is for the operations between the linear layers. From the outputs of the linear layers those are computed again
at little cost, in whatever batch the backward happens to run in. So requests can share a forward with some
neighbours and a backward with others, and neither pays for a second forward.

Works by the type of a module (`nn.Linear`, transformers' `Conv1D`), not by architecture. Other products (of
experts, of quantized layers) are simply computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

# Memory of a tensor beside its elements: 1,300 bytes on Linux, with what stands around it.
TENSOR_BYTES = 1408


@dataclass(frozen=True, slots=True)
class LinearOutputs:
    """The outputs `[tokens, features]` of all linear layers, in the order of their calls, for one request."""

    outputs: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs) + self.overhead_bytes

    @property
    def overhead_bytes(self) -> int:
        """The memory of the tensors beside their elements, which each member of a pass takes for its own."""
        return TENSOR_BYTES * len(self.outputs)

    def split(self, sizes: Sequence[int]) -> list[LinearOutputs]:
        """The products of each of the requests that shared a pass, in its memory."""
        parts = zip(*(output.split(list(sizes)) for output in self.outputs), strict=True)
        return [LinearOutputs(of_one) for of_one in parts]

    def copied(self) -> LinearOutputs:
        """The same in memory of their own."""
        return LinearOutputs(tuple(output.clone() for output in self.outputs))

    @staticmethod
    def merged(parts: Sequence[LinearOutputs]) -> LinearOutputs:
        """The products of a pass that these requests share."""
        if len(parts) == 1:
            return parts[0]
        return LinearOutputs(tuple(torch.cat(outputs) for outputs in zip(*(p.outputs for p in parts), strict=True)))


class LinearLayers:
    """The linear layers of a model, made to record their outputs and to replay them. For one thread."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layout: tuple[int, int] | None = None  # rows and tokens of the pass; None: neither record nor replay
        self._recorded: list[tuple[torch.Tensor, int]] | None = None
        self._replayed: Iterator[torch.Tensor] = iter(())
        for module in modules:
            if type(module) in (nn.Linear, Conv1D):
                module.forward = partial(self._forward, module, module.forward)

    @contextmanager
    def recording(self, rows: int, tokens: int) -> Iterator[Callable[[], LinearOutputs | None]]:
        """Record a pass `[rows, tokens, …]`. What is yielded gives the products when the pass has ended, or None
        if the model has written into an output since."""
        self._layout, self._recorded = (rows, tokens), []
        recorded = self._recorded
        try:
            yield lambda: _unchanged(recorded)
        finally:
            self._layout = self._recorded = None

    @contextmanager
    def replaying(self, rows: int, tokens: int, linear_outputs: LinearOutputs) -> Iterator[None]:
        """Within it the linear layers return what was recorded, and differentiate as if they had computed it."""
        self._layout, self._replayed = (rows, tokens), iter(linear_outputs.outputs)
        try:
            yield
        finally:
            self._layout, self._replayed = None, iter(())

    def _forward(
        self, module: nn.Module, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        # A product over other rows than the pass has (routed experts) belongs to no request alone.
        if self._layout is None or x.ndim != 3 or x.shape[:2] != self._layout:
            return compute(x)
        if self._recorded is not None:
            output = compute(x)
            self._recorded.append((output.detach(), output._version))
            return output
        product = next(self._replayed).view(*x.shape[:2], -1)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        result: torch.Tensor = _KnownOutput.apply(x, weight, product)  # type: ignore[no-untyped-call]
        return result


def _unchanged(recorded: list[tuple[torch.Tensor, int]]) -> LinearOutputs | None:
    if any(output._version != version for output, version in recorded):
        return None
    return LinearOutputs(tuple(output.flatten(0, 1) for output, _ in recorded))


class _KnownOutput(torch.autograd.Function):
    """A linear layer whose output is known: only its backward computes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight  # [out, in]; frozen, so autograd need not watch it
        return product.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.weight, None, None
