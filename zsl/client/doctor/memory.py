"""Estimate whether a whole model fits into this machine's memory."""

from __future__ import annotations

import torch

from zsl.files.free_memory import free_bytes
from zsl.models.reference import ModelReference
from zsl.split.stack import whole_class

HEADROOM = 1.2  # for loading, and a step of few tokens


def whole_model_bytes(reference: ModelReference, dtype: torch.dtype) -> int:
    """Return the bytes of the whole model's parameters, without allocating them. Raises `ModelError`."""
    with torch.device("meta"):
        model = whole_class(reference.config)(reference.config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def does_not_fit(reference: ModelReference, dtype: torch.dtype) -> str | None:
    """Return why the whole model cannot be loaded here, in words; None if it can, or if unknown."""
    needed, free = whole_model_bytes(reference, dtype) * HEADROOM, free_bytes()
    if free is None or needed <= free:
        return None
    return f"the whole model takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
