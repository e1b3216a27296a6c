"""A trunk for a checkpoint, served from this process: quick to start, real in everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zsl.split.cut import parse_cut
from zsl.trunk.daemon.embedded import EmbeddedTrunk
from zsl.trunk.daemon.load import plan_trunk
from zsl.wire.messages import Quantization, Reveal

from .models import CUT


@contextmanager
def served(
    reference: str,
    *,
    cut: str = CUT,
    forward_only: bool = False,
    quantize: Quantization | None = None,
    reveals: tuple[Reveal, ...] = (),
) -> Iterator[str]:
    """The endpoint of a trunk that serves `reference`."""
    how = {"forward_only": forward_only, "quantize": quantize, "reveals": reveals}
    plan = plan_trunk(reference, parse_cut(cut), torch.float32, "cpu", **how)  # type: ignore[arg-type]
    with EmbeddedTrunk(plan) as trunk:
        yield trunk.endpoint
