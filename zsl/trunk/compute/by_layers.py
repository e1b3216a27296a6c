"""Activation checkpointing: gradients layer by layer, in memory for one layer's graph. Pure torch.

Keeps the inputs of about sqrt(layers) layers, and recomputes those between; or the inputs of all. Every operation is
that of the whole graph, on the same numbers, so the result is equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Layer = Callable[[torch.Tensor], torch.Tensor]
# At the input, and at each weight; None for one that was not used.
Gradients = tuple[torch.Tensor, Sequence[torch.Tensor | None]]


def stretch_of(layers: int, *, keeps_inputs: bool = False) -> int:
    """Return the number of layers between two kept inputs."""
    return 1 if keeps_inputs else max(round(math.sqrt(layers)), 1)


def most_kept(layers: int, *, keeps_inputs: bool = False) -> int:
    """Return the peak number of kept tensors of the input's size, beside a layer's own: inputs of stretches and within
    one, the input of the pass, and the gradient between two layers."""
    stretch = stretch_of(layers, keeps_inputs=keeps_inputs)
    return math.ceil(layers / stretch) + stretch + 2


def gradients_by_layers(
    layers: Sequence[Layer],
    leaf: torch.Tensor,
    gradient: torch.Tensor,
    weights: Sequence[torch.Tensor] = (),
    *,
    keeps_inputs: bool,
    after_layer: Callable[[], object],
) -> Gradients:
    """Return the vector-Jacobian products of `layers` in sequence, at `leaf` and at `weights`, each of one layer.

    `keeps_inputs`: of all layers, which takes one forward more and not two. Calls `after_layer` after each layer.
    """
    at_weights: list[torch.Tensor | None] = [None] * len(weights)
    starts = range(0, len(layers), stretch_of(len(layers), keeps_inputs=keeps_inputs))
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
            gradient, of_layer = layer_gradients(layer, within.pop(), gradient, weights)
            at_weights = [known if new is None else new for known, new in zip(at_weights, of_layer, strict=True)]
            after_layer()
    return gradient, at_weights


def layer_gradients(
    layer: Layer, x: torch.Tensor, gradient: torch.Tensor, weights: Sequence[torch.Tensor] = ()
) -> Gradients:
    """Return the vector-Jacobian products of one layer at `x` and at `weights`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = layer(x)
    return gradients_at(output, x, gradient, weights)


def gradients_at(
    output: torch.Tensor | Sequence[torch.Tensor],
    x: torch.Tensor,
    gradient: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] = (),
) -> Gradients:
    """Return the vector-Jacobian products of a graph at `x`, and at `weights` or None. Consumes the graph.

    `output` and `gradient`: one tensor, or several, whose products are added up.
    """
    at_x, *at_weights = torch.autograd.grad(output, [x, *weights], gradient, allow_unused=bool(weights))
    return at_x, at_weights


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
