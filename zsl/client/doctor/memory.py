"""Estimate whether a whole model fits into this machine's memory."""

from __future__ import annotations

from pathlib import Path

import torch

from zsl.models.reference import ModelReference
from zsl.split.stack import whole_class

HEADROOM = 1.2  # for loading, and a step of few tokens


def whole_model_bytes(reference: ModelReference, dtype: torch.dtype) -> int:
    """Return the bytes of the whole model's parameters, without allocating them. Raises `ModelError`."""
    with torch.device("meta"):
        model = whole_class(reference.config)(reference.config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def free_bytes(root: Path = Path("/")) -> int | None:
    """Return the available bytes of the machine or of the container; None if unknown."""
    free = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
        group = root / "sys/fs/cgroup"
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            free.append(int(most) - int((group / "memory.current").read_text()) + _cached_bytes(group))
    except (OSError, ValueError):
        pass  # no Linux, or no container
    return min(free, default=None)


def _cached_bytes(group: Path) -> int:
    """Return the bytes of a container's file cache that can be reclaimed."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def does_not_fit(reference: ModelReference, dtype: torch.dtype) -> str | None:
    """Return why the whole model cannot be loaded here, in words; None if it can, or if unknown."""
    needed, free = whole_model_bytes(reference, dtype) * HEADROOM, free_bytes()
    if free is None or needed <= free:
        return None
    return f"the whole model takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
