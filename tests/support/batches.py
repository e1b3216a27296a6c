"""Batches as trainers make them."""

from __future__ import annotations

from typing import Any

import torch

from .models import VOCABULARY


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def plain(rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, Any]:
    ids = tokens(rows, length, seed)
    return {"input_ids": ids, "labels": ids}


def padded(side: str, length: int = 16) -> dict[str, Any]:
    """Rows of 16, 9 and 5 real tokens; labels of the padding are ignored."""
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
    for row, real in enumerate((length, 9, 5)):
        padding = slice(real, None) if side == "right" else slice(0, length - real)
        mask[row, padding] = 0
        ids[row, padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(lengths: tuple[int, ...] = (7, 5, 4)) -> dict[str, Any]:
    """Several sequences in one row, told apart by positions that start again, as TRL packs them."""
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}
