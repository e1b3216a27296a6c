"""Merge requests into one pass by packing or stacking, and split its result. Pure torch.

Packed: the sequences of all requests concatenated in one row, without padding between them. Stacked: rows concatenated
along the row dimension, for requests of equal row length. A request's `Sharing` (`zsl.trunk.work`) says which of the
two it allows: packing accepts `Sequences`, stacking accepts `Rows`. No model, no wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from zsl.trunk.compute.linear_outputs import LinearOutputs
from zsl.trunk.compute.passes import Pass, Rows, Sequences, joined_sequences

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class MergedPass:
    """A pass of one or more requests. `order`: the index of the request at each place. `filling`: padding tokens at the
    end."""

    inputs: Pass
    order: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # rows and tokens of the request at each place
    filling: int = 0

    @property
    def sizes(self) -> list[int]:
        """Tokens of the request at each place."""
        return [rows * tokens for rows, tokens in self.shapes]

    @property
    def _spans(self) -> list[int]:
        return [*self.sizes, self.filling]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate tensors `[rows, tokens, hidden]` of the requests to the shape of the pass."""
        flat = torch.cat([tensors[index].flatten(0, 1) for index in self.order])
        return _filled(flat, self.filling).view(self.inputs.activations.shape)

    def split(self, result: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor of the shape of the pass into one `[rows, tokens, hidden]` per request."""
        parts = result.flatten(0, 1).split(self._spans)[: len(self.order)]
        return self._in_order_of_requests(
            [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]
        )

    def join_linear_outputs(self, linear_outputs: Sequence[LinearOutputs]) -> LinearOutputs:
        """Concatenate the linear outputs of the requests to those of the pass."""
        merged = LinearOutputs.merged([linear_outputs[index] for index in self.order])
        return LinearOutputs(tuple(_filled(output, self.filling) for output in merged.outputs))

    def split_linear_outputs(self, linear_outputs: LinearOutputs) -> list[LinearOutputs]:
        """Split the linear outputs of the pass by request."""
        return self._in_order_of_requests(linear_outputs.split(self._spans)[: len(self.order)])

    def _in_order_of_requests(self, parts: Sequence[Part]) -> list[Part]:
        by_request = dict(zip(self.order, parts, strict=True))
        return [by_request[index] for index in range(len(parts))]


def alone(part: Pass) -> MergedPass:
    """Make a pass of one request in its own shape, with the numbers of the client's whole model."""
    return MergedPass(part, (0,), ((part.rows, part.tokens),))


def packed(
    parts: Sequence[Sequences], shapes: Sequence[tuple[int, int]] | None = None, *, pass_tokens: int = 0
) -> MergedPass:
    """Pack all sequences into one row; with `pass_tokens`, padded with zeros to that length.

    `shapes`: rows and tokens of each request; None if each is one row.
    """
    # Sort by length: adjacent sequences of equal length need no reordering for attention.
    order = sorted(range(len(parts)), key=lambda index: (parts[index].lengths[0], 0 in parts[index].masked))
    filling = max(0, pass_tokens - sum(part.tokens for part in parts))
    inputs = joined_sequences([parts[index] for index in order], filling=filling, invariant=pass_tokens > 0)
    if shapes is None:
        shapes = [(1, part.tokens) for part in parts]
    return MergedPass(inputs, tuple(order), tuple(shapes[index] for index in order), filling)


def packed_behind_caches(parts: Sequence[Rows], lengths: Sequence[int]) -> MergedPass:
    """Pack the rows of requests, each behind a cache of its length, into one row, in order."""
    activations, positions = [], []
    for part, length in zip(parts, lengths, strict=True):
        given = part.position_ids
        if given is None:
            given = torch.arange(length, length + part.tokens, device=part.activations.device).unsqueeze(0)
        activations.append(part.activations.flatten(0, 1))
        positions.append(given.expand(part.rows, -1).flatten())
    row, at = torch.cat(activations).unsqueeze(0), torch.cat(positions).unsqueeze(0)
    shapes = tuple((part.rows, part.tokens) for part in parts)
    each = tuple(tokens for rows, tokens in shapes for _ in range(rows))
    return MergedPass(Sequences(row, at, each), tuple(range(len(parts))), shapes)


def stacked(parts: Sequence[Rows]) -> MergedPass:
    """Concatenate the rows of requests with equal row length and the same optional tensors."""

    def rows(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [t.expand(part.rows, -1) for t, part in zip(tensors, parts, strict=True) if t is not None]
        if len(present) not in (0, len(parts)):
            raise ValueError("some of the requests have a mask or positions and some do not")
        return torch.cat(present) if present else None

    inputs = Rows(
        torch.cat([part.activations for part in parts]),
        rows([part.attention_mask for part in parts]),
        rows([part.position_ids for part in parts]),
    )
    return MergedPass(inputs, tuple(range(len(parts))), tuple((part.rows, part.tokens) for part in parts))


def _filled(flat: torch.Tensor, filling: int) -> torch.Tensor:
    """Append `filling` tokens of zeros to `[tokens, features]`."""
    return F.pad(flat, (0, 0, 0, filling)) if filling else flat
