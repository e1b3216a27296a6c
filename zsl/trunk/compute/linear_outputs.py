"""Record the outputs of a forward's linear layers, and replay them in its backward.

The vector-Jacobian product of a frozen linear layer needs its weight and nothing of the forward; what autograd saves is
for the operations between linear layers. With the outputs of the linear layers, a backward recomputes only those
operations, at little cost and in any batch. So a request can share its forward and its backward with different
requests, without a second forward.

Patches modules by type (`nn.Linear`, transformers' `Conv1D`, the quantized layers of bitsandbytes), not by
architecture. Other matrix products (experts) are recomputed.
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

from zsl.models.quantize import gradient_at_input
from zsl.trunk.compute.adapters import PassAdapters
from zsl.trunk.compute.few_rows import swapped_linear
from zsl.trunk.compute.frozen_linear import FrozenLinear

# Overhead of a tensor beside its elements, with its references: 1,300 bytes on Linux.
TENSOR_BYTES = 1408

# Of a linear layer: the output of an input, or the gradient at the input of one at the output.
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LinearOutputs:
    """Outputs `[tokens, features]` of all linear layers, in call order, of one request or pass."""

    outputs: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs) + self.overhead_bytes

    @property
    def overhead_bytes(self) -> int:
        """Bytes of the tensors beside their elements, counted in full for each request of a pass."""
        return TENSOR_BYTES * len(self.outputs)

    def split(self, sizes: Sequence[int]) -> list[LinearOutputs]:
        """Split those of a pass by request, as views. `sizes`: tokens of each request."""
        parts = zip(*(output.split(list(sizes)) for output in self.outputs), strict=True)
        return [LinearOutputs(of_one) for of_one in parts]

    def copied(self) -> LinearOutputs:
        """Return a copy in its own memory."""
        return LinearOutputs(tuple(output.clone() for output in self.outputs))

    @staticmethod
    def merged(parts: Sequence[LinearOutputs]) -> LinearOutputs:
        """Concatenate those of requests to those of their pass."""
        if len(parts) == 1:
            return parts[0]
        return LinearOutputs(tuple(torch.cat(outputs) for outputs in zip(*(p.outputs for p in parts), strict=True)))


class LinearLayers:
    """Linear layers of a model, patched to record and replay their outputs. For one thread.

    Outputs are those of the layers' own weights, for the inputs that adapters (`adapted`) give them. What adapters do
    before and after is computed anew in a replay.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.by_path: dict[str, FrozenLinear] = {}
        self.adapters: PassAdapters | None = None
        self._layout: tuple[int, int] | None = None  # rows and tokens of the pass; None: compute normally
        self._recorded: list[tuple[torch.Tensor, int]] | None = None
        self._replayed: Iterator[torch.Tensor] = iter(())
        self._most_swapped_rows = 0
        for path, module in modules:
            if not FrozenLinear.is_one(module):
                continue
            patched: Any = module
            layer = self.by_path[path] = FrozenLinear(module)
            compute, at_input = patched.forward, partial(_gradient_at_input, layer)
            if layer.quantized:
                at_input = partial(gradient_at_input, module)
                compute = partial(_without_input, compute, at_input)
            elif type(module) is nn.Linear:
                compute = partial(self._linear, module, compute)
            patched.forward = partial(self._forward, path, compute, at_input)

    @contextmanager
    def recording(self, rows: int, tokens: int) -> Iterator[Callable[[], LinearOutputs | None]]:
        """Record a pass `[rows, tokens, …]`. Yields a function that returns the outputs after the pass, or None if the
        model has modified one in place."""
        self._layout, self._recorded = (rows, tokens), []
        recorded = self._recorded
        try:
            yield lambda: _unchanged(recorded)
        finally:
            self._layout = self._recorded = None

    @contextmanager
    def replaying(self, rows: int, tokens: int, linear_outputs: LinearOutputs) -> Iterator[None]:
        """Make the linear layers return recorded outputs, and differentiate as if computed."""
        self._layout, self._replayed = (rows, tokens), iter(linear_outputs.outputs)
        try:
            yield
        finally:
            self._layout, self._replayed = None, iter(())

    @contextmanager
    def adapted(self, adapters: PassAdapters | None) -> Iterator[None]:
        """Apply adapters to the inputs and outputs of the linear layers."""
        self.adapters = adapters
        try:
            yield
        finally:
            self.adapters = None

    @contextmanager
    def swapped(self, most_rows: int) -> Iterator[None]:
        """Compute products of 2 to `most_rows` rows by `swapped_linear`."""
        self._most_swapped_rows = most_rows
        try:
            yield
        finally:
            self._most_swapped_rows = 0

    def _linear(self, module: nn.Linear, compute: Product, x: torch.Tensor) -> torch.Tensor:
        if 2 <= x.numel() // x.shape[-1] <= self._most_swapped_rows:
            return swapped_linear(x, module.weight, module.bias)
        return compute(x)

    def _forward(self, path: str, compute: Product, at_input: Product, x: torch.Tensor) -> torch.Tensor:
        if self.adapters is None:
            return self._output(compute, at_input, x)
        x = self.adapters.adapted_input(path, x)
        output = self._output(compute, at_input, x)
        return self.adapters.adapted_output(path, x, output, self.by_path[path])

    def _output(self, compute: Product, at_input: Product, x: torch.Tensor) -> torch.Tensor:
        # An input of another shape than the pass (routed experts) cannot be split by request.
        if self._layout is None or x.ndim != 3 or x.shape[:2] != self._layout:
            return compute(x)
        if self._recorded is not None:
            output = compute(x)
            self._recorded.append((output.detach(), output._version))
            return output
        product = next(self._replayed).view(*x.shape[:2], -1)
        result: torch.Tensor = _KnownOutput.apply(x, at_input, product)  # type: ignore[no-untyped-call]
        return result


def _gradient_at_input(layer: FrozenLinear, gradient: torch.Tensor) -> torch.Tensor:
    return gradient @ layer.matrix()


def _without_input(compute: Product, at_input: Product, x: torch.Tensor) -> torch.Tensor:
    """Compute a quantized layer whose graph does not keep its input, which that of bitsandbytes does for nothing."""
    output: torch.Tensor = _KnownOutput.apply(x, at_input, compute(x.detach()))  # type: ignore[no-untyped-call]
    return output


def _unchanged(recorded: list[tuple[torch.Tensor, int]]) -> LinearOutputs | None:
    if any(output._version != version for output, version in recorded):
        return None
    return LinearOutputs(tuple(output.flatten(0, 1) for output, _ in recorded))


class _KnownOutput(torch.autograd.Function):
    """Linear layer with a known output: only its backward computes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, at_input: Product, product: torch.Tensor) -> torch.Tensor:
        ctx.at_input = at_input
        return product.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.at_input(gradient), None, None
