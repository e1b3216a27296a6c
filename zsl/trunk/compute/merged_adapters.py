"""Adapters (LoRA) of the requests in a merged pass, of any ranks and targets, in two products a linear layer.

The ranks of all adapters of a layer are concatenated: `x @ A.T` `[tokens, sum of ranks]`, where each token keeps the
columns of its own request only, and from it `@ B.T`. A and B are the leaves of autograd: each request's gradient is a
slice of theirs. Numbers differ from those of a request alone by rounding only, with one exception: values of one
request that are not finite, times zeros, make the gradients of all adapters NaN.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F

from zsl.trunk.compute.adapters import FlatGradients, LoadedAdapter, LowRank, Span, flat, gradient_or_zeros

# Companies whose concatenated weights are kept: those of a forward serve its backward.
MAX_COMPANIES = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one request's adapter in a block. `slot`: the request's index in its company; `index`: the module's in
    its layout."""

    slot: int
    index: int
    has_bias: bool
    dropout: float


@dataclass(frozen=True, slots=True)
class Block:
    """Concatenated adapters of one linear layer, at most one of each request."""

    parts: tuple[Part, ...]
    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    a: torch.Tensor  # [sum of ranks, in]
    b: torch.Tensor  # [sum of ranks, out]: transposed, and times the scaling
    bias: torch.Tensor | None  # [slots, out]: times the scaling
    scaling: torch.Tensor  # [sum of ranks, 1]
    bias_scaling: torch.Tensor  # [slots, 1]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Leaves of autograd."""
        return [self.a, self.b] if self.bias is None else [self.a, self.b, self.bias]

    def split(
        self, at_a: torch.Tensor, at_b: torch.Tensor, at_bias: torch.Tensor | None = None
    ) -> list[list[torch.Tensor]]:
        """Split the gradients of the leaves: for each part those of A, B and bias."""
        of_a, of_b = at_a.split(self.ranks), (at_b * self.scaling).t().split(self.ranks, 1)
        if at_bias is None:
            return [[a, b] for a, b in zip(of_a, of_b, strict=True)]
        of_bias = (at_bias * self.bias_scaling).unbind()
        return [
            [a, b, bias] if part.has_bias else [a, b]
            for part, a, b, bias in zip(self.parts, of_a, of_b, of_bias, strict=True)
        ]


class Company:
    """Concatenated weights of the adapters of a pass, in any order of its requests."""

    def __init__(self, adapters: Sequence[LoadedAdapter]) -> None:
        self.dtype = reduce(torch.promote_types, (adapter.dtype for adapter in adapters))
        self._scalings: dict[tuple[tuple[float, ...], tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        entries: dict[str, list[list[tuple[int, LowRank]]]] = {}  # by path, and place among a request's adapters there
        for slot, adapter in enumerate(adapters):
            for path, of_path in adapter.by_path.items():
                blocks = entries.setdefault(path, [])
                for place, entry in enumerate(of_path):
                    if place == len(blocks):
                        blocks.append([])
                    blocks[place].append((slot, entry))
        with torch.no_grad():
            self.blocks = {path: [self._block(block) for block in blocks] for path, blocks in entries.items()}
        self.leaves = [leaf for blocks in self.blocks.values() for block in blocks for leaf in block.leaves]

    def _block(self, slots_and_entries: Sequence[tuple[int, LowRank]]) -> Block:
        slots, entries = zip(*slots_and_entries, strict=True)
        ranks = tuple(entry.a.shape[0] for entry in entries)
        scaling, bias_scaling = self._scaling(tuple(entry.scaling for entry in entries), ranks, entries[0].a.device)
        a = torch.cat([entry.a for entry in entries]).to(self.dtype).requires_grad_()
        b = _scaled(torch.cat([entry.b.t() for entry in entries]).to(self.dtype), scaling)
        bias = None
        if any(entry.bias is not None for entry in entries):
            zeros = b.new_zeros(b.shape[1])
            biases = torch.stack([zeros if entry.bias is None else entry.bias.to(self.dtype) for entry in entries])
            bias = _scaled(biases, bias_scaling)
        parts = tuple(
            Part(slot, entry.index, entry.bias is not None, entry.dropout) for slot, entry in slots_and_entries
        )
        return Block(parts, slots, ranks, a, b, bias, scaling, bias_scaling)

    def _scaling(
        self, scalings: tuple[float, ...], ranks: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scaling of each row of a block, and of each part."""
        found = self._scalings.get((scalings, ranks))
        if found is None:
            of_parts = torch.tensor(scalings, dtype=torch.float64).unsqueeze(1)
            of_rows = of_parts.repeat_interleave(torch.tensor(ranks), 0)
            found = self._scalings[scalings, ranks] = (of_rows.to(device, self.dtype), of_parts.to(device, self.dtype))
        return found


def _scaled(weights: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """Multiply, without infinite results: those would make the outputs of the other requests NaN."""
    return (weights * scaling).nan_to_num_(0.0).requires_grad_()


class Companies:
    """The latest companies. For the compute thread."""

    def __init__(self) -> None:
        self._by_serials: OrderedDict[tuple[int, ...], Company] = OrderedDict()

    def of(self, adapters: Sequence[LoadedAdapter]) -> Company:
        """Return the company of these adapters, which are sorted by their serials."""
        serials = tuple(adapter.serial for adapter in adapters)
        company = self._by_serials.pop(serials, None) or Company(adapters)
        self._by_serials[serials] = company
        if len(self._by_serials) > MAX_COMPANIES:
            self._by_serials.popitem(last=False)
        return company


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
        slots = torch.full((len(spans),), -1)
        slots[self._places] = torch.arange(len(members))
        self._slot_of_token = slots.repeat_interleave(torch.tensor(self._sizes)).unsqueeze(1)
        self._foreign: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}

    @property
    def form(self) -> tuple[object, ...]:
        kinds = Counter((*adapter.adapter.form, adapter.drops) for adapter in self._adapters)
        return tuple(sorted(kinds.items()))

    @property
    def storages(self) -> Collection[int]:
        return ()  # a graph keeps the concatenated weights

    def added(self, path: str, x: torch.Tensor, output: torch.Tensor, *, quantized: bool) -> torch.Tensor:
        blocks, dtype = self._company.blocks.get(path), self._company.dtype
        if blocks is None:
            return output
        if x.ndim != 3 or x.shape[0] * x.shape[1] != len(self._slot_of_token):
            raise RuntimeError(f"the tokens of {path} cannot be told apart by request")
        x, result = x.flatten(0, 1).to(dtype), output.flatten(0, 1)
        for block in blocks:
            a, b, bias = block.a, block.b, block.bias
            if not self._trains:
                a, b, bias = a.detach(), b.detach(), None if bias is None else bias.detach()
            low = F.linear(self._dropped(block, x) if self._drops else x, a)
            # Not a product with zeros: what another request's columns make of a token may be infinite.
            low = low.masked_fill(self._foreign_columns(block.slots, block.ranks), 0)
            result = torch.addmm(result, low, b) if result.dtype == dtype else result + low @ b
            if bias is not None:
                foreign = self._foreign_columns(block.slots, (1,) * len(block.slots))
                result = result + foreign.logical_not().to(dtype) @ bias
        return result.to(output.dtype).view(output.shape)

    def _foreign_columns(self, slots: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Return True for the columns of another request than a token's, `[tokens, sum of sizes]`. `sizes`: columns of
        each slot. Shared by the layers of a pass."""
        found = self._foreign.get((slots, sizes))
        if found is None:
            slot_of_column = torch.tensor(slots).repeat_interleave(torch.tensor(sizes))
            device = self._company.leaves[0].device
            found = self._foreign[slots, sizes] = (self._slot_of_token != slot_of_column).to(device)
        return found

    def _dropped(self, block: Block, x: torch.Tensor) -> torch.Tensor:
        """Apply each request's dropout to its tokens."""
        factors = [x.new_ones(1, 1).expand(size, x.shape[1]) for size in self._sizes]
        for part in block.parts:
            place = self._places[part.slot]
            factor = self._adapters[part.slot].dropout(part.index, part.dropout, self._sizes[place], x.shape[1])
            if factor is not None:
                factors[place] = factor.to(x.dtype)
        return x * torch.cat(factors)

    def leaves(self, members: Collection[int]) -> list[torch.Tensor]:
        return self._company.leaves if members else []

    def flat_gradients(self, members: Collection[int], at_leaves: Sequence[torch.Tensor | None]) -> FlatGradients:
        if not members:
            return {}
        rest = iter(at_leaves)
        of_slots: list[dict[int, list[torch.Tensor]]] = [{} for _ in self._adapters]  # by index in the layout
        for blocks in self._company.blocks.values():
            for block in blocks:
                gradients = [gradient_or_zeros(leaf, next(rest)) for leaf in block.leaves]
                for part, of_part in zip(block.parts, block.split(*gradients), strict=True):
                    of_slots[part.slot][part.index] = of_part
        found = {}
        for member in members:
            by_index = of_slots[self._slots[member]]
            found[member] = flat([gradient for index in sorted(by_index) for gradient in by_index[index]])
        return found
