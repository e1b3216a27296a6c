"""Weights of an adapter version on the trunk's device: flat, and one by one where they are applied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import prod

import torch

from zsl.trunk.adapter import AdapterVersion
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.prefix import LayerPrefix
from zsl.wire.adapter_layout import AdaptedModule, AdapterLayout, LoraModule, PrefixLayer
from zsl.wire.frames import ALIGNMENT_BYTES
from zsl.wire.tensors import TORCH_DTYPES

_serials = count()


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Magnitude of DoRA, a leaf of autograd, and the norms of the adapted weight's rows, which have no gradient."""

    vector: torch.Tensor  # [out]
    row_norms: torch.Tensor  # [out]


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA of one linear layer. The weights are leaves of autograd. `index`: its place in the layout."""

    index: int
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    bias: torch.Tensor | None  # [out]
    magnitude: Magnitude | None
    scaling: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Scale:
    """IA³ of one linear layer's inputs or outputs. `index`: as of `LowRank`."""

    index: int
    vector: torch.Tensor  # [features], a leaf of autograd


Scaled = tuple[str, bool]  # path of a linear layer, and whether its inputs are scaled or its outputs


@dataclass(frozen=True, slots=True)
class Entries:
    """Weights of an adapter by the place where they are applied; `weights`: all, in the order of the layout."""

    by_path: Mapping[str, tuple[LowRank, ...]]
    scales: Mapping[Scaled, tuple[Scale, ...]]
    prefix: Mapping[int, LayerPrefix]  # by index of the layer
    weights: tuple[torch.Tensor, ...]

    @property
    def storages(self) -> Collection[int]:
        """Addresses of the memory that the version accounts for."""
        found = (entry.magnitude for entries in self.by_path.values() for entry in entries)
        kept = [*self.weights, *(magnitude.row_norms for magnitude in found if magnitude is not None)]
        return {tensor.untyped_storage().data_ptr() for tensor in kept}


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """Weights of an adapter version on the trunk's device, in the dtype of their computation.

    `flat`: in the order of the layout. `layers`: the trunk's linear layers, by path. `serial`: unique in the process.
    """

    layout: AdapterLayout
    flat: torch.Tensor  # [elements]
    layers: Mapping[str, FrozenLinear]
    serial: int

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    @cached_property
    def form(self) -> tuple[object, ...]:
        """Key that is equal for adapters whose weights have the same places and shapes."""
        return self.layout.dtype, tuple(map(_kind, self.layout.modules))

    @cached_property
    def entries(self) -> Entries:
        """The weights one by one. Made at the first use, as a merged pass of adapters of one form needs one's only."""
        shapes = [module.shapes for module in self.layout.modules]
        sizes = [prod(shape) for of_module in shapes for shape in of_module]
        # Aligned, as the parameters of a local model are: alignment changes the rounding of some kernels.
        addresses = (self.flat.data_ptr(), *(size * self.dtype.itemsize for size in sizes))
        unaligned = any(address % ALIGNMENT_BYTES for address in addresses)
        parts = iter(self.flat.split(sizes))
        by_path: dict[str, tuple[LowRank, ...]] = {}
        scales: dict[Scaled, tuple[Scale, ...]] = {}
        prefix: dict[int, LayerPrefix] = {}
        weights: list[torch.Tensor] = []
        for index, (module, of_module) in enumerate(zip(self.layout.modules, shapes, strict=True)):
            own = [next(parts).view(shape) for shape in of_module]
            own = [(weight.clone() if unaligned else weight).requires_grad_() for weight in own]
            weights += own
            if isinstance(module, LoraModule):
                a, b, *vector = own
                bias, magnitude = vector[0] if module.has_bias else None, None
                if module.has_magnitude:
                    row_norms = self.layers[module.path].adapted_row_norms(a, b, module.scaling)
                    magnitude = Magnitude(vector[0], row_norms)
                entry = LowRank(index, a, b, bias, magnitude, module.scaling, module.dropout)
                by_path[module.path] = (*by_path.get(module.path, ()), entry)
            elif isinstance(module, PrefixLayer):
                keys, values = own
                prefix[int(module.path)] = LayerPrefix(keys, values, module.tokens, module.heads)
            else:
                scaled = (module.path, module.at_input)
                scales[scaled] = (*scales.get(scaled, ()), Scale(index, own[0]))
        return Entries(by_path, scales, prefix, tuple(weights))


def _kind(module: AdaptedModule) -> tuple[object, ...]:
    match module:
        case LoraModule():
            return module.path, module.rank, module.has_bias, module.has_magnitude, module.dropout > 0
        case PrefixLayer():
            return module.path, module.rows, module.tokens
        case _:
            return module.path, module.at_input


def loaded(version: AdapterVersion, layers: Mapping[str, FrozenLinear], device: torch.device) -> LoadedAdapter:
    """Return the weights of a version on a device, loaded once. For the compute thread. `layers`: by path."""
    if version.loaded is None:
        flat = torch.frombuffer(version.weights, dtype=TORCH_DTYPES[version.dtype])
        flat = flat.to(device, TORCH_DTYPES[version.layout.dtype])
        version.loaded = LoadedAdapter(version.layout, flat, layers, next(_serials))
    assert isinstance(version.loaded, LoadedAdapter)
    return version.loaded
