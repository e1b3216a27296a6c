"""Adapters (LoRA, DoRA, IA³) of the requests in a merged pass, of any ranks and targets, in batched products.

For each linear layer the weights of the requests' adapters are stacked, and their tokens too: `x @ A.T` and `@ B.T` are
batched products, with one matrix of each request, and vectors of IA³ multiply each request's rows. So a request's
numbers are those that it gets alone, up to rounding, whatever values its neighbours have. The stacked weights are the
leaves of autograd: each request's gradient is a slice of theirs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from zsl.trunk.compute.adapters import FlatGradients, Span, flat, gradient_or_zeros
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.loaded_adapter import LoadedAdapter, LowRank, Magnitude, Scale, Scaled
from zsl.trunk.compute.rows import TokenRows, add_rows, put_rows, take_rows

# Companies whose stacked weights are kept: those of a forward serve its backward.
MAX_COMPANIES = 2


@dataclass(frozen=True, slots=True)
class Part:
    """A request's adapter in a block. `slot`: the request's index in its company; `index`: the module's in its
    layout."""

    slot: int
    index: int
    rank: int
    dropout: float
    has_bias: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Stacked adapters of one linear layer, of similar ranks: padded with zeros to the largest. `start`: place of the
    first part's weights in its flat weights."""

    start: int
    parts: tuple[Part, ...]
    slots: tuple[int, ...]
    a: torch.Tensor  # [parts, rank, in]
    b: torch.Tensor  # [parts, out, rank]
    bias: torch.Tensor | None  # [parts, 1, out]
    magnitude: Magnitude | None  # [parts, 1, out]; without a bias
    scaling: torch.Tensor  # [parts, 1, 1]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Leaves of autograd."""
        if self.magnitude is not None:
            return [self.a, self.b, self.magnitude.vector]
        return [self.a, self.b] if self.bias is None else [self.a, self.b, self.bias]

    def split(self, gradients: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Split the gradients of the leaves: for each part those of A, B, and bias or magnitude."""
        of_parts = []
        for part, *(a, b, *vector) in zip(self.parts, *(g.contiguous().unbind() for g in gradients), strict=True):
            weights = [a, b] if part.rank == a.shape[0] else [a[: part.rank], b[:, : part.rank]]
            has_vector = part.has_bias or self.magnitude is not None
            of_parts.append(weights + vector if has_vector else weights)
        return of_parts


@dataclass(frozen=True, slots=True)
class ScaleBlock:
    """Stacked vectors of IA³ on the inputs or outputs of one linear layer. `start`: as of `Block`."""

    start: int
    parts: tuple[tuple[int, int], ...]  # the request's index in its company, the module's in its layout
    slots: tuple[int, ...]
    vectors: torch.Tensor  # [parts, 1, features], a leaf of autograd

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Leaves of autograd."""
        return [self.vectors]


# A request's index in its company, its weights (if all are alike, those of the first), and their module.
Member = tuple[int, LowRank, Any]


class Company:
    """Stacked weights of the adapters of a pass.

    If all have the same modules and ranks, all their flat weights are stacked at once, and so are their gradients.
    """

    def __init__(self, adapters: Sequence[LoadedAdapter]) -> None:
        first = adapters[0]
        alike = not first.layout.magnitudes and all(adapter.form == first.form for adapter in adapters)
        self._stacked = torch.stack([adapter.flat for adapter in adapters]) if alike else None  # [slots, elements]
        # By path; then by place among a request's adapters of that layer, dtype, size of the rank, and method.
        entries: dict[str, dict[tuple[int, torch.dtype, int, bool], list[Member]]] = {}
        scales: dict[Scaled, dict[tuple[int, torch.dtype], list[tuple[int, Scale]]]] = {}
        for slot, adapter in enumerate(adapters):
            found = (first if alike else adapter).entries
            for path, of_path in found.by_path.items():
                blocks = entries.setdefault(path, {})
                for place, entry in enumerate(of_path):
                    size = (entry.a.shape[0] - 1).bit_length()
                    kind = (place, adapter.dtype, size, entry.magnitude is not None)
                    blocks.setdefault(kind, []).append((slot, entry, adapter.layout.modules[entry.index]))
            for scaled, of_scaled in found.scales.items():
                for place, scale in enumerate(of_scaled):
                    scales.setdefault(scaled, {}).setdefault((place, adapter.dtype), []).append((slot, scale))
        self._scalings: dict[tuple[float, ...], torch.Tensor] = {}
        with torch.no_grad():
            self.blocks = {
                path: [self._block(blocks[kind]) for kind in sorted(blocks, key=_in_order)]
                for path, blocks in entries.items()
            }
            self.scales = {
                scaled: [self._scale_block(blocks[kind]) for kind in sorted(blocks, key=_in_order)]
                for scaled, blocks in scales.items()
            }
        self._all_blocks: list[Block | ScaleBlock] = [block for blocks in self.blocks.values() for block in blocks]
        self._all_blocks += [block for blocks in self.scales.values() for block in blocks]
        self.leaves = [leaf for block in self._all_blocks for leaf in block.leaves]

    def flat_gradients(self, at_leaves: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
        """Return the flat gradients of each adapter, by slot. `at_leaves`: of the leaves, None for zeros."""
        if self._stacked is None:
            of_slots = self._split([gradient_or_zeros(*pair) for pair in zip(self.leaves, at_leaves, strict=True)])
            by_slot = [by_index for _, by_index in sorted(of_slots.items())]
            return [flat([one for index in sorted(of_one) for one in of_one[index]]) for of_one in by_slot]
        found, rest = torch.empty_like(self._stacked), iter(at_leaves)
        for block in self._all_blocks:
            start = block.start
            for leaf in block.leaves:
                size, gradient = leaf[0].numel(), next(rest)
                place = found[:, start : start + size].view(leaf.shape)
                place.zero_() if gradient is None else place.copy_(gradient)
                start += size
        return found.unbind()

    def _split(self, at_leaves: Sequence[torch.Tensor]) -> dict[int, dict[int, list[torch.Tensor]]]:
        """Split the gradients of the leaves: those of each module's weights by slot, then by index in the layout."""
        rest, found = iter(at_leaves), defaultdict[int, dict[int, list[torch.Tensor]]](dict)
        for block in self._all_blocks:
            gradients = [next(rest) for _ in block.leaves]
            if isinstance(block, Block):
                for part, of_part in zip(block.parts, block.split(gradients), strict=True):
                    found[part.slot][part.index] = of_part
            else:
                for (slot, index), of_vector in zip(block.parts, gradients[0], strict=True):
                    found[slot][index] = [of_vector]
        return found

    def _block(self, members: Sequence[Member]) -> Block:
        parts = tuple(
            Part(slot, entry.index, entry.a.shape[0], module.dropout, entry.bias is not None)
            for slot, entry, module in members
        )
        entries = [entry for _, entry, _ in members]
        rank = max(part.rank for part in parts)
        a, b = [entry.a for entry in entries], [entry.b for entry in entries]
        if any(part.rank < rank for part in parts):
            a = [F.pad(weight, (0, 0, 0, rank - part.rank)) for weight, part in zip(a, parts, strict=True)]
            b = [F.pad(weight, (0, rank - part.rank)) for weight, part in zip(b, parts, strict=True)]
        start = entries[0].start
        of_vector = start + a[0].numel() + b[0].numel()
        bias = magnitude = None
        if any(part.has_bias for part in parts):
            zeros = b[0].new_zeros(b[0].shape[0])
            biases = [zeros if entry.bias is None else entry.bias for entry in entries]
            bias = self._stack(of_vector, biases).unsqueeze(1).requires_grad_()
        magnitudes = [entry.magnitude for entry in entries if entry.magnitude is not None]
        if magnitudes:
            vectors = self._stack(of_vector, [one.vector for one in magnitudes]).unsqueeze(1).requires_grad_()
            magnitude = Magnitude(vectors, torch.stack([one.row_norms for one in magnitudes]).unsqueeze(1))
        return Block(
            start,
            parts,
            tuple(part.slot for part in parts),
            self._stack(start, a).requires_grad_(),
            self._stack(start + a[0].numel(), b).requires_grad_(),
            bias,
            magnitude,
            self._scaling([module.scaling for _, _, module in members], a[0]),
        )

    def _scale_block(self, slots_and_scales: Sequence[tuple[int, Scale]]) -> ScaleBlock:
        start = slots_and_scales[0][1].start
        vectors = self._stack(start, [scale.vector for _, scale in slots_and_scales]).unsqueeze(1).requires_grad_()
        parts = tuple((slot, scale.index) for slot, scale in slots_and_scales)
        return ScaleBlock(start, parts, tuple(slot for slot, _ in parts), vectors)

    def _stack(self, start: int, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack weights of equal shapes. `start`: their place in the flat weights, where all adapters are alike."""
        if self._stacked is None:
            return torch.stack(list(weights))
        first = weights[0]
        return self._stacked[:, start : start + first.numel()].view(-1, *first.shape)

    def _scaling(self, scalings: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        """Return scalings as a tensor, shared by the layers."""
        found = self._scalings.get(key := tuple(scalings))
        if found is None:
            found = self._scalings[key] = torch.tensor(scalings, dtype=torch.float32, device=like.device).view(-1, 1, 1)
        return found


def _in_order(kind: tuple[object, ...]) -> tuple[object, str]:
    return kind[0], repr(kind)


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
            low = torch.bmm(take_rows(dropped, rows), a.transpose(1, 2))
            low = (low * block.scaling).to(a.dtype)
            if rows.is_whole and bias is None and block.magnitude is None and result.dtype == b.dtype:
                result = torch.baddbmm(result.view(*low.shape[:2], -1), low, b.transpose(1, 2)).flatten(0, 1)
                continue
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
