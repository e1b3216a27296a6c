"""Inputs of a pass: `Rows` as the client has them, or `Sequences` in one packed row. Pure torch.

In `Sequences` each sequence attends to itself only. They carry all masks and positions of a request, so that packing
loses nothing. No model, no wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from zsl.trunk.work import Shape


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a client's model, on the trunk's device."""

    activations: torch.Tensor  # [rows, tokens, hidden], in the trunk's dtype
    attention_mask: torch.Tensor | None = None  # [rows, tokens]
    position_ids: torch.Tensor | None = None  # [rows or 1, tokens]

    @property
    def rows(self) -> int:
        return self.activations.shape[0]

    @property
    def tokens(self) -> int:
        return self.activations.shape[1]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.activations, self.attention_mask, self.position_ids)


@dataclass(frozen=True, slots=True)
class Sequences:
    """One row of many sequences, each of which attends to itself only, on the trunk's device.

    `masked`: indices of the sequences with masked tokens. `seen`: False for exactly those tokens.
    """

    activations: torch.Tensor  # [1, tokens, hidden], in the trunk's dtype
    position_ids: torch.Tensor  # [1, tokens]
    lengths: tuple[int, ...]  # of the sequences, in order
    masked: frozenset[int] = frozenset()
    seen: torch.Tensor | None = None  # [tokens], bool; None where nothing is masked
    invariant: bool = False  # forbid kernels whose rounding depends on the rest of the pass

    rows = 1

    @property
    def tokens(self) -> int:
        return self.activations.shape[1]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.activations, self.position_ids, self.seen)


Pass = Rows | Sequences


def as_rows(part: Pass) -> Rows:
    """Return a part that is rows. Raises `TypeError` for packed sequences."""
    if not isinstance(part, Rows):
        raise TypeError("packed sequences cannot be stacked as rows")
    return part


def sequences_of(rows: Rows, shape: Shape) -> Sequences:
    """Concatenate the sequences of a request's rows into one row, in order."""
    device = rows.activations.device
    positions = torch.arange(rows.tokens, device=device) if rows.position_ids is None else rows.position_ids
    seen = None
    if shape.masked:
        assert rows.attention_mask is not None
        seen = rows.attention_mask.flatten() != 0
    return Sequences(
        rows.activations.flatten(0, 1).unsqueeze(0),
        positions.expand(rows.rows, -1).reshape(1, -1),
        shape.lengths,
        shape.masked,
        seen,
    )


def joined_sequences(parts: Sequence[Sequences], *, filling: int, invariant: bool) -> Sequences:
    """Concatenate the sequences of all parts into one row, with a last one of `filling` zeros."""
    activations = [part.activations for part in parts]
    positions = [part.position_ids for part in parts]
    lengths = [length for part in parts for length in part.lengths]
    starts = accumulate((len(part.lengths) for part in parts), initial=0)
    masked = frozenset(start + index for start, part in zip(starts, parts, strict=False) for index in part.masked)
    if filling:
        first = parts[0].activations
        activations.append(first.new_zeros(1, filling, first.shape[2]))
        positions.append(torch.arange(filling, device=first.device).unsqueeze(0))
        lengths.append(filling)
    row = torch.cat(activations, 1)
    seen = None
    if masked:
        seen = torch.ones(row.shape[1], dtype=torch.bool, device=row.device)
        ends = accumulate((part.tokens for part in parts), initial=0)
        for part, (start, end) in zip(parts, pairwise(ends), strict=True):
            if part.seen is not None:
                seen[start:end] = part.seen
    return Sequences(row, torch.cat(positions, 1), tuple(lengths), masked, seen, invariant)


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
