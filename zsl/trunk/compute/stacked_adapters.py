"""Weights of the adapters of a pass, stacked by linear layer, and their gradients by request.

The stacked weights are the leaves of autograd: each request's gradient is a slice of theirs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

from zsl.trunk.compute.adapters import flat, gradient_or_zeros
from zsl.trunk.compute.loaded_adapter import LoadedAdapter, LowRank, Magnitude, Scale, Scaled
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
