"""What a loaded trunk can do, found out by trying: whether its family packs, whether packed passes of one length are
the same bit for bit whoever shares them, and what its passes cost. Takes a few passes at start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from zsl.trunk.costs import Costs, fit_cost
from zsl.trunk.joining import alone, packed
from zsl.trunk.middle import Middle, Pass

COST_TOKENS = (8, 96)
# Of repeated measurements the shortest counts: at least so many, and more while they are short.
COST_REPEATS = 3
COST_SECONDS = 0.2
# Sequences of several requests: equal and different lengths, one of a single token.
PACKING_LENGTHS = ((5,), (3, 3), (1,), (5,))
COMPOSITIONS = 12
SEED = 0

Timed = TypeVar("Timed")
Result = tuple[torch.Tensor, torch.Tensor]  # output and gradient at the input, [rows, tokens, hidden]


def can_pack(middle: Middle) -> bool:
    """Whether requests of several lengths in one row give what each gives alone, forward and backward."""
    if middle.mixes_rows:
        return False
    random = torch.Generator().manual_seed(SEED)
    parts = [_request(middle, lengths, random) for lengths in PACKING_LENGTHS]
    gradients = [torch.randn(part.activations.shape, generator=random).to(part.activations) for part in parts]
    try:
        together = _packed_results(middle, parts, gradients, pass_tokens=0)
    except Exception:  # whatever a family's own code says to a packed row
        return False
    separate = [_alone_result(middle, part, gradient) for part, gradient in zip(parts, gradients, strict=True)]
    # Of the largest magnitude. A family that does not pack is wrong by far more; random inputs, which are none that
    # a model has seen, amplify rounding.
    tolerance = math.sqrt(torch.finfo(middle.dtype).eps)
    return all(
        _close(ours, theirs, tolerance)
        for pair in zip(together, separate, strict=True)
        for ours, theirs in zip(*pair, strict=True)
    )


def is_deterministic(middle: Middle, pass_tokens: int) -> bool:
    """Whether a request's output and gradient are the same bits in random company, in passes of `pass_tokens`."""
    random = torch.Generator().manual_seed(SEED)

    def length(longest: int) -> int:
        return int(torch.randint(1, longest + 1, (), generator=random))

    probe = _request(middle, (length(max(pass_tokens // 4, 1)),), random)
    gradient = torch.randn(probe.activations.shape, generator=random).to(probe.activations)
    expected = _packed_results(middle, [probe], [gradient], pass_tokens=pass_tokens)[0]
    for _ in range(COMPOSITIONS):
        neighbours: list[Pass] = []
        room = pass_tokens - probe.tokens
        while room > 0 and len(neighbours) < 6:
            neighbours.append(_request(middle, (length(room),), random))
            room -= neighbours[-1].tokens
        place = int(torch.randint(0, len(neighbours) + 1, (), generator=random))
        parts = [*neighbours[:place], probe, *neighbours[place:]]
        gradients = [
            gradient if part is probe else torch.randn(part.activations.shape, generator=random).to(part.activations)
            for part in parts
        ]
        found = _packed_results(middle, parts, gradients, pass_tokens=pass_tokens)[place]
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
            return False
    return True


def measure_costs(middle: Middle, clock: Callable[[], float] = time.perf_counter) -> Costs:
    """The fitted costs of this trunk on this device, from a few short passes."""
    random = torch.Generator().manual_seed(SEED)
    samples: dict[str, list[tuple[int, float]]] = {"forward": [], "backward": [], "products": []}
    for tokens in COST_TOKENS:
        part = alone(_request(middle, (tokens,), random)).inputs
        gradient = torch.ones_like(part.activations)
        _, products = middle.forward_with_products(part)  # and warm up
        best = {name: float("inf") for name in samples}
        begun = clock()
        repeats = 0
        while repeats < COST_REPEATS or clock() - begun < COST_SECONDS:
            repeats += 1
            graph, forward_seconds = _timed(lambda: middle.graph(part), middle.device, clock)  # noqa: B023
            _, backward_seconds = _timed(lambda: graph.gradients(gradient), middle.device, clock)  # noqa: B023
            _, products_seconds = _timed(
                lambda: middle.graph(part, products).gradients(gradient),  # noqa: B023
                middle.device,
                clock,
            )
            for name, seconds in zip(samples, (forward_seconds, backward_seconds, products_seconds), strict=True):
                best[name] = min(best[name], seconds)
        for name, seconds in best.items():
            samples[name].append((tokens, seconds))
    forward, backward, from_products = (fit_cost(samples[name]) for name in samples)
    return Costs(forward, backward, from_products)


def _timed(run: Callable[[], Timed], device: torch.device, clock: Callable[[], float]) -> tuple[Timed, float]:
    begun = clock()
    result = run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return result, clock() - begun


def _request(middle: Middle, lengths: Sequence[int], random: torch.Generator) -> Pass:
    """A random request: rows of one length."""
    shape = (len(lengths), lengths[0], middle.hidden_size)
    return Pass(torch.randn(shape, generator=random).to(middle.device, middle.dtype))


def _alone_result(middle: Middle, part: Pass, gradient: torch.Tensor) -> Result:
    graph = middle.graph(part)
    return graph.output.detach(), graph.gradients(gradient)


def _packed_results(
    middle: Middle, parts: Sequence[Pass], gradients: Sequence[torch.Tensor], *, pass_tokens: int
) -> list[Result]:
    """Output and gradient of each part, computed as the daemon does: a forward, then a backward from its products."""
    joined = packed(parts, pass_tokens=pass_tokens)
    output, products = middle.forward_with_products(joined.inputs)
    at_input = middle.graph(joined.inputs, products).gradients(joined.join(gradients))
    return list(zip(joined.split(output), joined.split(at_input), strict=True))


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    scale = float(theirs.abs().max()) or 1.0
    return float((ours - theirs).abs().max()) <= tolerance * scale
