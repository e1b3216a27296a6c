"""Product of a few rows with a weight, as `weight @ x.T` where that is faster than `x @ weight.T`.

For a few rows in float32 MKL computes the second on one thread. On two cores the weights of SmolLM2's trunk take 31, 31
and 32 ms with 2, 4 and 8 rows so, and 12, 13 and 26 ms the other way; the same in bfloat16 is slower. So each daemon
measures it at start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

MEASURED_ROWS = (2, 4, 8)
MEASURED_BYTES = 128 * 2**20  # of weights, more than caches hold
REPEATS = 3
FASTER = 0.9  # of the time of `F.linear`

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def swapped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `F.linear(x, weight, bias)` but for rounding, for `x` `[..., in]` and a weight `[out, in]`."""
    product = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], -1)


def most_swapped_rows(weights: Sequence[torch.Tensor], clock: Callable[[], float] = time.perf_counter) -> int:
    """Measure up to how many rows `swapped_linear` is faster with these weights `[out, in]`; 0 if never."""
    measured, nbytes = [], 0
    for weight in weights:
        if nbytes >= MEASURED_BYTES:
            break
        measured.append(weight)
        nbytes += weight.nbytes
    most = 0
    for rows in MEASURED_ROWS:
        if not measured or _seconds(swapped_linear, measured, rows, clock) > FASTER * _seconds(
            F.linear, measured, rows, clock
        ):
            break
        most = rows
    return most


@torch.no_grad()
def _seconds(product: Product, weights: Sequence[torch.Tensor], rows: int, clock: Callable[[], float]) -> float:
    """Return the least seconds of some repeats of a product with all weights."""
    inputs = {weight.shape[1]: torch.ones(rows, weight.shape[1], dtype=weight.dtype) for weight in weights}
    least = float("inf")
    for _ in range(REPEATS):
        begun = clock()
        for weight in weights:
            product(inputs[weight.shape[1]], weight)
        least = min(least, clock() - begun)
    return least
