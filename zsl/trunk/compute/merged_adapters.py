"""Adapters (LoRA, DoRA, IA³) of the requests in a merged pass, of any ranks and targets, in batched products.

For each linear layer the weights of the requests' adapters are stacked, and their tokens too: `x @ A.T` and `@ B.T` are
batched products, with one matrix of each request, and vectors of IA³ multiply each request's rows. So a request's
numbers are those that it gets alone, up to rounding, whatever values its neighbours have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from zsl.trunk.compute.adapters import FlatGradients, Span
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.rows import TokenRows, add_rows, put_rows, take_rows
from zsl.trunk.compute.stacked_adapters import Block, Companies


class _Sum(torch.autograd.Function):
    """Sum of an output `[parts, tokens, out]` and the low-rank product of its input.

    The products have the small rank as rows, not as columns: batched products on a CPU take a half to a quarter of the
    time then, and that is how autograd would not order them.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor
    ) -> torch.Tensor:
        low = (torch.bmm(a, x.transpose(1, 2)) * scaling).to(a.dtype)  # [parts, rank, tokens]
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return torch.baddbmm(output, low.transpose(1, 2), b.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        _, to_x, to_a, to_b, _ = ctx.needs_input_grad
        at_low = (torch.bmm(b.transpose(1, 2), gradient.transpose(1, 2)) * ctx.scaling).to(b.dtype)
        return (
            gradient,
            torch.bmm(at_low.transpose(1, 2), a) if to_x else None,
            torch.bmm(at_low, x) if to_a else None,
            torch.bmm(low, gradient).transpose(1, 2) if to_b else None,
            None,
        )


class MergedAdapters:
    """Adapters of a pass of several requests. `trains`: some need gradients."""

    def __init__(self, spans: Sequence[Span], companies: Companies, *, trains: bool) -> None:
        self._trains = trains
        # In the order of their serials, so that a backward in another order finds the company of its forward.
        members = [(span.adapter, place) for place, span in enumerate(spans) if span.adapter is not None]
        members.sort(key=lambda member: member[0].adapter.serial)
        self._adapters = [adapter for adapter, _ in members]
        self._places = [place for _, place in members]
        self._sizes = [span.tokens for span in spans]
        self._slots = {spans[place].member: slot for slot, place in enumerate(self._places)}
        self._drops = any(adapter.drops for adapter in self._adapters)
        self._company = companies.of([adapter.adapter for adapter in self._adapters])
        self._rows: dict[tuple[int, ...], TokenRows] = {}

    @property
    def form(self) -> tuple[object, ...]:
        kinds = Counter(
            (self._sizes[place], *adapter.adapter.form, adapter.drops)
            for place, adapter in zip(self._places, self._adapters, strict=True)
        )
        return (self._places == sorted(self._places), *sorted(kinds.items()))

    @property
    def storages(self) -> Collection[int]:
        return ()  # a graph keeps the stacked weights

    def prefix_cache(self) -> None:
        return None  # a request with a prefix runs alone

    def adapted_input(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(path, x, at_input=True)

    def adapted_output(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        return self._scaled(path, self._added(path, x, output, layer), at_input=False)

    def _scaled(self, path: str, x: torch.Tensor, *, at_input: bool) -> torch.Tensor:
        """Multiply each request's tokens by its vectors."""
        blocks = self._company.scales.get((path, at_input))
        if blocks is None:
            return x
        self._check(path, x)
        result = x.flatten(0, 1)
        for block in blocks:
            vectors = self._weight(block.vectors)
            rows = self._rows_of(block.slots, x.device)
            taken = take_rows(result, rows)
            scaled = (taken.to(vectors.dtype) if at_input else taken) * vectors
            result = put_rows(result, scaled.to(x.dtype), rows)
        return result.view(x.shape)

    def _check(self, path: str, x: torch.Tensor) -> None:
        if x.ndim != 3 or x.shape[0] * x.shape[1] != sum(self._sizes):
            raise RuntimeError(f"the tokens of {path} cannot be told apart by request")

    def _added(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        """Add the low-rank products to an output, and what DoRA makes of it."""
        blocks = self._company.blocks.get(path)
        if blocks is None:
            return output
        self._check(path, x)
        x, result = x.flatten(0, 1), output.flatten(0, 1)
        for block in blocks:
            a, b = self._weight(block.a), self._weight(block.b)
            bias = None if block.bias is None else self._weight(block.bias)
            rows = self._rows_of(block.slots, x.device)
            dropped = x.to(a.dtype)
            if self._drops:
                dropped = self._dropped(block, dropped)
            taken = take_rows(dropped, rows)
            if rows.is_whole and bias is None and block.magnitude is None and result.dtype == b.dtype:
                result = result.view(*taken.shape[:2], -1)
                result = _Sum.apply(result, taken, a, b, block.scaling).flatten(0, 1)  # type: ignore[no-untyped-call]
                continue
            low = torch.bmm(taken, a.transpose(1, 2))
            low = (low * block.scaling).to(a.dtype)
            added = torch.bmm(low, b.transpose(1, 2))
            if bias is not None:
                added = added + (bias * block.scaling).to(a.dtype)
            elif block.magnitude is not None:
                scale = self._weight(block.magnitude.vector) / block.magnitude.row_norms
                added = (scale - 1) * self._base(block, dropped, result, rows, layer) + scale * added
            result = add_rows(result, added, rows)
        return result.to(output.dtype).view(output.shape)

    def _base(
        self, block: Block, dropped: torch.Tensor, result: torch.Tensor, rows: TokenRows, layer: FrozenLinear
    ) -> torch.Tensor:
        """Return the outputs without bias that DoRA scales, as rows. Where dropout is active, its input is dropped."""
        base = take_rows(result, rows)
        if layer.bias is not None:
            base = base - layer.bias
        drops = [self._adapters[part.slot].drops and part.dropout > 0 for part in block.parts]
        if not any(drops):
            return base
        chosen = torch.tensor(drops, device=base.device).view(-1, 1, 1)
        return torch.where(chosen, layer.product(take_rows(dropped, rows)), base)

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, without gradient if this pass needs none."""
        return weight if self._trains else weight.detach()

    def _rows_of(self, slots: tuple[int, ...], device: torch.device) -> TokenRows:
        """Return the tokens of these requests, shared by the layers of a pass."""
        found = self._rows.get(slots)
        if found is None:
            found = self._rows[slots] = TokenRows.of(self._sizes, [self._places[slot] for slot in slots], device)
        return found

    def _dropped(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        """Apply each request's dropout to its tokens."""
        factors = [x.new_ones(1, 1).expand(size, x.shape[1]) for size in self._sizes]
        for part in block.parts:
            place = self._places[part.slot]
            factor = self._adapters[part.slot].dropout(part.index, part.dropout, self._sizes[place], x.shape[1])
            if factor is not None:
                factors[place] = factor
        return x * torch.cat(factors)

    def leaves(self, members: Collection[int]) -> list[torch.Tensor]:
        return self._company.leaves if members else []

    def flat_gradients(self, members: Collection[int], at_leaves: Sequence[torch.Tensor | None]) -> FlatGradients:
        if not members:
            return {}
        found = self._company.flat_gradients(at_leaves)
        return {member: found[self._slots[member]] for member in members}
