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
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from zsl.trunk.compute.adapters import FlatGradients, Span, flat, gradient_or_zeros
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.loaded_adapter import LoadedAdapter, LowRank, Magnitude, Scale, Scaled
from zsl.trunk.compute.rows import TokenRows, add_rows, put_rows, take_rows
from zsl.wire.adapter_layout import Ia3Module, LoraModule, Shape

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
    """Stacked adapters of one linear layer, of similar ranks: padded with zeros to the largest."""

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
    """Stacked vectors of IA³ on the inputs or outputs of one linear layer."""

    parts: tuple[tuple[int, int], ...]  # the request's index in its company, the module's in its layout
    slots: tuple[int, ...]
    vectors: torch.Tensor  # [parts, 1, features], a leaf of autograd

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Leaves of autograd."""
        return [self.vectors]


# A request's index in its company, its weights, and their module.
Member = tuple[int, LowRank, Any]


class Company:
    """Stacked weights of the adapters of a pass.

    If all have the same modules and ranks, all their flat weights are stacked at once, and so are their gradients.
    """

    def __init__(self, adapters: Sequence[LoadedAdapter]) -> None:
        first = adapters[0]
        self._alike = not first.layout.magnitudes and all(adapter.form == first.form for adapter in adapters)
        self._scalings: dict[tuple[float, ...], torch.Tensor] = {}
        self.blocks: dict[str, list[Block]] = {}
        self.scales: dict[Scaled, list[ScaleBlock]] = {}
        self.leaves: list[torch.Tensor] = []  # if all are alike, in the order of their flat weights
        self._all_blocks: list[Block | ScaleBlock] = []
        with torch.no_grad():
            if self._alike:
                self._stack_flat(adapters)
            else:
                self._stack_each(adapters)

    def _stack_flat(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Make the blocks of adapters that are alike."""
        layout, slots = adapters[0].layout, tuple(range(len(adapters)))
        shapes = [module.shapes for module in layout.modules]
        stacked = torch.stack([adapter.flat for adapter in adapters])  # [slots, elements]
        weights = iter(stacked.split([prod(shape) for of_module in shapes for shape in of_module], dim=1))
        of_slots = zip(*(adapter.layout.modules for adapter in adapters), strict=True)
        for index, (of_module, modules) in enumerate(zip(shapes, of_slots, strict=True)):
            own = [next(weights).view(len(slots), *_matrix(shape)).requires_grad_() for shape in of_module]
            self.leaves += own
            module = modules[0]
            if isinstance(module, LoraModule):
                a, b, *bias = own
                parts = tuple(
                    Part(slot, index, module.rank, one.dropout, module.has_bias) for slot, one in enumerate(modules)
                )
                scaling = self._scaling([one.scaling for one in modules], a)
                block = Block(parts, slots, a, b, bias[0] if bias else None, None, scaling)
                self.blocks.setdefault(module.path, []).append(block)
            else:
                assert isinstance(module, Ia3Module)
                vectors = ScaleBlock(tuple((slot, index) for slot in slots), slots, own[0])
                self.scales.setdefault((module.path, module.at_input), []).append(vectors)

    def _stack_each(self, adapters: Sequence[LoadedAdapter]) -> None:
        """Make the blocks of adapters that differ, or have magnitudes."""
        # By path; then by place among a request's adapters of that layer, dtype, size of the rank, and method.
        entries: dict[str, dict[tuple[int, torch.dtype, int, bool], list[Member]]] = {}
        scales: dict[Scaled, dict[tuple[int, torch.dtype], list[tuple[int, Scale]]]] = {}
        for slot, adapter in enumerate(adapters):
            for path, of_path in adapter.entries.by_path.items():
                blocks = entries.setdefault(path, {})
                for place, entry in enumerate(of_path):
                    size = (entry.a.shape[0] - 1).bit_length()
                    kind = (place, adapter.dtype, size, entry.magnitude is not None)
                    blocks.setdefault(kind, []).append((slot, entry, adapter.layout.modules[entry.index]))
            for scaled, of_scaled in adapter.entries.scales.items():
                for place, scale in enumerate(of_scaled):
                    scales.setdefault(scaled, {}).setdefault((place, adapter.dtype), []).append((slot, scale))
        for path, blocks in entries.items():
            self.blocks[path] = [self._block(blocks[kind]) for kind in sorted(blocks, key=_in_order)]
        for scaled, of_kinds in scales.items():
            self.scales[scaled] = [_scale_block(of_kinds[kind]) for kind in sorted(of_kinds, key=_in_order)]
        self._all_blocks += [block for of_path in self.blocks.values() for block in of_path]
        self._all_blocks += [block for of_scaled_path in self.scales.values() for block in of_scaled_path]
        self.leaves += [leaf for block in self._all_blocks for leaf in block.leaves]

    def flat_gradients(self, at_leaves: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
        """Return the flat gradients of each adapter, by slot. `at_leaves`: of the leaves, None for zeros."""
        gradients = [gradient_or_zeros(*pair) for pair in zip(self.leaves, at_leaves, strict=True)]
        if self._alike:
            return torch.cat([gradient.flatten(1) for gradient in gradients], 1).unbind()
        by_slot = [by_index for _, by_index in sorted(self._split(gradients).items())]
        return [flat([one for index in sorted(of_one) for one in of_one[index]]) for of_one in by_slot]

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
        bias = magnitude = None
        if any(part.has_bias for part in parts):
            zeros = b[0].new_zeros(b[0].shape[0])
            biases = [zeros if entry.bias is None else entry.bias for entry in entries]
            bias = torch.stack(biases).unsqueeze(1).requires_grad_()
        magnitudes = [entry.magnitude for entry in entries if entry.magnitude is not None]
        if magnitudes:
            vectors = torch.stack([one.vector for one in magnitudes]).unsqueeze(1).requires_grad_()
            magnitude = Magnitude(vectors, torch.stack([one.row_norms for one in magnitudes]).unsqueeze(1))
        return Block(
            parts,
            tuple(part.slot for part in parts),
            torch.stack(a).requires_grad_(),
            torch.stack(b).requires_grad_(),
            bias,
            magnitude,
            self._scaling([module.scaling for _, _, module in members], a[0]),
        )

    def _scaling(self, scalings: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        """Return scalings as a tensor, shared by the layers."""
        found = self._scalings.get(key := tuple(scalings))
        if found is None:
            found = self._scalings[key] = torch.tensor(scalings, dtype=torch.float32, device=like.device).view(-1, 1, 1)
        return found


def _matrix(shape: Shape) -> Shape:
    return (1, *shape) if len(shape) == 1 else shape


def _scale_block(slots_and_scales: Sequence[tuple[int, Scale]]) -> ScaleBlock:
    vectors = torch.stack([scale.vector for _, scale in slots_and_scales]).unsqueeze(1).requires_grad_()
    parts = tuple((slot, scale.index) for slot, scale in slots_and_scales)
    return ScaleBlock(parts, tuple(slot for slot, _ in parts), vectors)


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
