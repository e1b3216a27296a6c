"""Activation checkpointing: gradients layer by layer, in memory for one layer's graph. Pure torch.

Keeps the inputs of about sqrt(layers) layers, and recomputes those between. Every operation is that of the whole graph,
on the same numbers, so the result is equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Layer = Callable[[torch.Tensor], torch.Tensor]


def stretch_of(layers: int) -> int:
    """Return the number of layers between two kept inputs."""
    return max(round(math.sqrt(layers)), 1)


def most_kept(layers: int) -> int:
    """Return the peak number of kept tensors of the input's size, beside a layer's own: inputs of stretches and within
    one, the input of the pass, and the gradient between two layers."""
    stretch = stretch_of(layers)
    return math.ceil(layers / stretch) + stretch + 2


def gradients_by_layers(
    layers: Sequence[Layer], leaf: torch.Tensor, gradient: torch.Tensor, *, after_layer: Callable[[], object]
) -> torch.Tensor:
    """Return the vector-Jacobian product of `layers` in sequence at `leaf`. Calls `after_layer` after each layer."""
    starts = range(0, len(layers), stretch_of(len(layers)))
    inputs = [leaf.detach()]
    with torch.no_grad():
        for start, following in pairwise(starts):
            inputs.append(_through(layers[start:following], inputs[-1], after_layer)[-1])
    for start in reversed(starts):
        stretch = layers[start : start + starts.step]
        with torch.no_grad():
            within = [inputs.pop()]
            within += _through(stretch[:-1], within[0], after_layer, keep=True)
        for layer in reversed(stretch):
            gradient = layer_gradient(layer, within.pop(), gradient)
            after_layer()
    return gradient


def layer_gradient(layer: Layer, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the vector-Jacobian product of one layer at `x`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = layer(x)
    (result,) = torch.autograd.grad(output, x, gradient)
    return result


def _through(
    layers: Sequence[Layer], x: torch.Tensor, after_layer: Callable[[], object], *, keep: bool = False
) -> list[torch.Tensor]:
    """Run layers in sequence, and return all outputs (`keep`) or only the last."""
    outputs: list[torch.Tensor] = []
    for layer in layers:
        x = layer(x)
        outputs = [*outputs, x] if keep else [x]
        after_layer()
    return outputs
