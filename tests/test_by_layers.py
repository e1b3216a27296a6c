"""Gradients layer by layer are those of the whole graph, whatever inputs are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from test_merging import backward_work, compute_of, forward_work, tensors
from zsl.trunk.compute.by_layers import Layer, gradients_by_layers
from zsl.trunk.work import Batch, Keep


@pytest.mark.parametrize(("keeps_inputs", "calls"), [(True, 8 + 9), (False, 6 + 2 * 3 + 9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_nine_layers_is_that_of_their_graph(keeps_inputs: bool, calls: int, weighted: bool) -> None:
    weights = torch.randn(9, 4, 4, requires_grad=weighted).unbind()
    called = 0

    def layer(weight: torch.Tensor) -> Layer:
        def run(x: torch.Tensor) -> torch.Tensor:
            nonlocal called
            called += 1
            return torch.tanh(x @ weight)

        return run

    layers = [layer(weight) for weight in weights]
    leaf, gradient = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    output = leaf
    for run in layers:
        output = run(output)
    leaves = list(weights) if weighted else []
    expected = torch.autograd.grad(output, [leaf, *leaves], gradient)
    called = 0
    at_input, at_weights = gradients_by_layers(
        layers, leaf, gradient, leaves, keeps_inputs=keeps_inputs, after_layer=lambda: None
    )
    assert torch.equal(at_input, expected[0])
    assert all(torch.equal(one, other) for one, other in zip(_known(at_weights), expected[1:], strict=True))
    assert called == calls


def test_backwards_of_a_batch_by_layers_are_those_from_their_graph(checkpoints: Callable[..., Path]) -> None:
    compute = compute_of(checkpoints("llama"))
    works = [forward_work(seed, tokens=4 + seed, keep=Keep.INPUT) for seed in range(3)]
    done = compute.run(Batch(tuple(works)))
    backwards = tuple(backward_work(work, one, seed) for seed, (work, one) in enumerate(zip(works, done, strict=True)))
    for batch in (backwards, backwards[:1]):
        whole, by_layers = (list(compute.run(Batch(batch, by_layers))) for by_layers in (False, True))
        assert all(torch.equal(*both) for both in zip(tensors(whole), tensors(by_layers), strict=True))


def _known(found: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [one for one in found if one is not None]
