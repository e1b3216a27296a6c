"""Two models on the same batch: every number of one beside the other's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Same = Callable[[torch.Tensor, torch.Tensor], bool]


@dataclass(frozen=True)
class Numbers:
    """Results of a training step."""

    logits: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


def numbers_of(model: nn.Module, batch: dict[str, Any]) -> Numbers:
    """Forward and backward of one batch."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    logits = output.logits.detach()
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool()]  # what stands at padding is nobody's
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Numbers(logits, output.loss.detach(), gradients)


def differing(one: Numbers, other: Numbers, same: Same = torch.equal) -> list[str]:
    """The names of the numbers that are not the same; a gradient that one lacks differs."""
    assert one.gradients.keys() == other.gradients.keys()
    assert one.gradients, "nothing is trainable: the comparison would hold for any model"
    names = [name for name in ("logits", "loss") if not same(getattr(one, name), getattr(other, name))]
    for name, gradient in one.gradients.items():
        theirs = other.gradients[name]
        if gradient is None or theirs is None or not same(gradient, theirs):
            names.append(name)
    return names


def within(tolerance: float) -> Same:
    """Equal up to `tolerance` times the largest magnitude of the two."""

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        scale = max(float(one.abs().max()), float(other.abs().max()), 1e-30)
        return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * scale

    return same
