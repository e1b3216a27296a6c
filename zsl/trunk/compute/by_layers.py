"""Gradients of a pass one layer at a time: memory for the graph of one layer, not of all. Pure torch.

Kept are the inputs of some layers, about as many as the square root of their number; those between are computed from
them again. Every operation is the one that the whole graph would run, on the same numbers, so no bit differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Layer = Callable[[torch.Tensor], torch.Tensor]


def stretch_of(layers: int) -> int:
    """The layers between two inputs that are kept."""
    return max(round(math.sqrt(layers)), 1)


def most_kept(layers: int) -> int:
    """The tensors of the input's size that are kept at most, beside a layer's own: inputs of stretches and within one,
    what the pass begins with, and the gradient between two layers."""
    stretch = stretch_of(layers)
    return math.ceil(layers / stretch) + stretch + 2


def gradients_by_layers(
    layers: Sequence[Layer], leaf: torch.Tensor, gradient: torch.Tensor, *, after_layer: Callable[[], object]
) -> torch.Tensor:
    """The vector-Jacobian product of `layers`, called one after the other on `leaf`. Calls `after_layer` often."""
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
    """The vector-Jacobian product of one layer."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = layer(x)
    (result,) = torch.autograd.grad(output, x, gradient)
    return result


def _through(
    layers: Sequence[Layer], x: torch.Tensor, after_layer: Callable[[], object], *, keep: bool = False
) -> list[torch.Tensor]:
    """What these layers give, each on what the one before it gave: all of them, or the last."""
    outputs: list[torch.Tensor] = []
    for layer in layers:
        x = layer(x)
        outputs = [*outputs, x] if keep else [x]
        after_layer()
    return outputs
