"""Tokens of some requests of a pass as equal rows, one of each request, and back. Differentiable. Pure torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Indices of the tokens of `count` requests, as rows of `length`.

    Shorter rows are filled with the request's first token, so that no value of another request can get there. None of
    the indices is there if the rows are the pass as it is.
    """

    count: int
    length: int
    index: torch.Tensor | None = None  # [count * length], tokens of the pass
    real: torch.Tensor | None = None  # [tokens of the requests], places in the rows that are no filling
    tokens: torch.Tensor | None = None  # [tokens of the requests], tokens of the pass, in the order of `real`

    @property
    def is_whole(self) -> bool:
        """True if the rows are the pass as it is."""
        return self.index is None

    @staticmethod
    def of(sizes: Sequence[int], places: Sequence[int], device: torch.device) -> TokenRows:
        """Return the rows of the requests at these places. `sizes`: tokens of each request of the pass."""
        chosen = [sizes[place] for place in places]
        count, length = len(places), max(chosen)
        if list(places) == list(range(len(sizes))) and min(chosen) == length:
            return TokenRows(count, length)
        starts = list(accumulate(sizes, initial=0))
        index: list[int] = []
        real: list[int] = []
        for row, (place, size) in enumerate(zip(places, chosen, strict=True)):
            index += [*range(starts[place], starts[place] + size), *[starts[place]] * (length - size)]
            real += range(row * length, row * length + size)
        of_pass = torch.tensor(index)
        places_of_real = torch.tensor(real)
        return TokenRows(
            count, length, of_pass.to(device), places_of_real.to(device), of_pass[places_of_real].to(device)
        )


def take_rows(x: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """Return the rows `[count, length, features]` of a pass `[tokens, features]`."""
    taken: torch.Tensor = x if rows.is_whole else _Take.apply(x, rows)  # type: ignore[no-untyped-call]
    return taken.view(rows.count, rows.length, -1)


def add_rows(x: torch.Tensor, added: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """Add rows to their tokens of a pass `[tokens, features]`, in the wider dtype of both."""
    added = added.flatten(0, 1)
    if rows.is_whole:
        return x + added
    result: torch.Tensor = _Add.apply(x, added, rows)  # type: ignore[no-untyped-call]
    return result


def put_rows(x: torch.Tensor, changed: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """Put rows in the place of their tokens of a pass `[tokens, features]`, of the same dtype."""
    changed = changed.flatten(0, 1)
    return changed if rows.is_whole else x.index_copy(0, rows.tokens, _real(changed, rows))  # type: ignore[arg-type]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: TokenRows) -> torch.Tensor:
        ctx.rows, ctx.tokens = rows, x.shape[0]
        return x.index_select(0, rows.index)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        at_x = gradient.new_zeros(ctx.tokens, gradient.shape[1])
        return at_x.index_copy_(0, ctx.rows.tokens, _real(gradient, ctx.rows)), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, added: torch.Tensor, rows: TokenRows) -> torch.Tensor:
        ctx.rows, ctx.dtypes = rows, (x.dtype, added.dtype)
        wide = torch.promote_types(x.dtype, added.dtype)
        return x.to(wide).index_add(0, rows.tokens, _real(added, rows).to(wide))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, (of_x, of_added) = ctx.rows, ctx.dtypes
        real = gradient.index_select(0, rows.tokens).to(of_added)
        if len(rows.real) == len(rows.index):
            return gradient.to(of_x), real, None
        at_added = real.new_zeros(len(rows.index), real.shape[1])
        return gradient.to(of_x), at_added.index_copy_(0, rows.real, real), None


def _real(rows_of_tokens: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """Leave the filling out."""
    assert rows.real is not None and rows.index is not None
    return rows_of_tokens if len(rows.real) == len(rows.index) else rows_of_tokens.index_select(0, rows.real)
