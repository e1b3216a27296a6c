"""Sums of adapter gradients over the micro-batches of a step. For the compute thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from zsl.errors import UnknownSumError
from zsl.trunk.adapter import AdapterUse, GradientSum


def add_to_sums(
    uses: Sequence[AdapterUse | None], gradients: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor | UnknownSumError]:
    """Add the flat gradients of backwards, by index, to the sums that they name, in the order of their positions.

    Returns what each backward answers with, if it does: its sum so far, or its own gradients. A backward that comes
    again is not added twice. The additions are in the order and the dtype of local ones, so the sum is the local one
    bit for bit.
    """
    answers: dict[int, torch.Tensor | UnknownSumError] = {}

    def position(index: int) -> int:
        use = uses[index]
        return use.sum.position if use is not None and use.sum is not None else 0

    for index in sorted(gradients, key=position):
        use = uses[index]
        assert use is not None
        found = gradients[index] if use.sum is None else _added(use, gradients[index])
        if isinstance(found, UnknownSumError):
            answers[index] = found
        elif use.gradients:
            answers[index] = found if use.sum is None else found.clone()  # later additions write into the sum
    return answers


def _added(use: AdapterUse, gradients: torch.Tensor) -> torch.Tensor | UnknownSumError:
    """Add gradients to a sum, and return the sum so far."""
    asked, kept = use.sum, use.version.sum
    assert asked is not None
    if kept is None or kept.name != asked.name:
        if asked.position > 0:
            return UnknownSumError()
        # A copy: the gradients may be a view of those of a whole pass.
        kept = use.version.sum = GradientSum(asked.name, 1, gradients.clone())
    elif kept.added < asked.position:
        return UnknownSumError()
    elif kept.added == asked.position:
        assert isinstance(kept.total, torch.Tensor)
        kept.total.add_(gradients)
        kept.added += 1
    elif use.gradients and kept.added > asked.position + 1:
        return UnknownSumError()  # more has been added since
    assert isinstance(kept.total, torch.Tensor)
    return kept.total
