"""Adapters (LoRA, DoRA, IA³) of the requests in a pass, applied to the inputs and outputs of the trunk's linear layers.

`SeparateAdapters`: each request's adapter is computed on its own tokens, in PEFT's order of operations. A
request that runs alone gets the numbers of a local PEFT model bit for bit; in a deterministic pass a request's numbers
do not depend on its neighbours. `zsl.trunk.compute.merged_adapters` computes all requests at once.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
import xxhash

from zsl.trunk.adapter import AdapterUse, AdapterVersion
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.wire.adapter_layout import LoraModule
from zsl.wire.tensors import TORCH_DTYPES

# Gradients of the flat weights of each request's adapter, in the dtype of their computation, by index of the request.
FlatGradients = dict[int, torch.Tensor]

_serials = count()


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Magnitude of DoRA, a leaf of autograd, and the norms of the adapted weight's rows, which have no gradient."""

    vector: torch.Tensor  # [out]
    row_norms: torch.Tensor  # [out]


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA of one linear layer. `index`: its place in the layout. The weights are leaves of autograd."""

    index: int
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    bias: torch.Tensor | None  # [out]
    magnitude: Magnitude | None
    scaling: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Scale:
    """IA³ of one linear layer's inputs or outputs. `index`: its place in the layout."""

    index: int
    vector: torch.Tensor  # [features], a leaf of autograd


Scaled = tuple[str, bool]  # path of a linear layer, and whether its inputs are scaled or its outputs


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """Weights of an adapter version on the trunk's device, in the dtype of their computation.

    `weights`: all of them, in the order of the layout. `form`: equal for adapters whose graphs have equal sizes.
    `serial`: unique in the process.
    """

    by_path: Mapping[str, tuple[LowRank, ...]]
    scales: Mapping[Scaled, tuple[Scale, ...]]
    weights: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    form: tuple[object, ...]
    serial: int

    @property
    def storages(self) -> Collection[int]:
        """Addresses of the memory that the version accounts for."""
        found = (entry.magnitude for entries in self.by_path.values() for entry in entries)
        kept = [*self.weights, *(magnitude.row_norms for magnitude in found if magnitude is not None)]
        return {tensor.untyped_storage().data_ptr() for tensor in kept}


def loaded(version: AdapterVersion, layers: Mapping[str, FrozenLinear], device: torch.device) -> LoadedAdapter:
    """Return the weights of a version on a device, loaded once. For the compute thread. `layers`: by path."""
    if version.loaded is None:
        version.loaded = _load(version, layers, device)
    assert isinstance(version.loaded, LoadedAdapter)
    return version.loaded


def _load(version: AdapterVersion, layers: Mapping[str, FrozenLinear], device: torch.device) -> LoadedAdapter:
    modules = version.layout.modules
    dtype = TORCH_DTYPES[version.layout.dtype]
    flat = torch.frombuffer(version.weights, dtype=TORCH_DTYPES[version.dtype]).to(device, dtype)
    parts = iter(flat.split([prod(shape) for module in modules for shape in module.shapes]))
    by_path: dict[str, tuple[LowRank, ...]] = {}
    scales: dict[Scaled, tuple[Scale, ...]] = {}
    kinds: list[tuple[object, ...]] = []
    weights: list[torch.Tensor] = []
    for index, module in enumerate(modules):
        # Copies are aligned, as the parameters of a local model are: alignment changes the rounding of some kernels.
        own = [next(parts).view(shape).clone().requires_grad_() for shape in module.shapes]
        weights += own
        if isinstance(module, LoraModule):
            a, b, *vector = own
            bias, magnitude = vector[0] if module.has_bias else None, None
            if module.has_magnitude:
                magnitude = Magnitude(vector[0], layers[module.path].adapted_row_norms(a, b, module.scaling))
            entry = LowRank(index, a, b, bias, magnitude, module.scaling, module.dropout)
            by_path[module.path] = (*by_path.get(module.path, ()), entry)
            kinds.append((module.path, module.rank, module.has_bias, module.has_magnitude, module.dropout > 0))
        else:
            scaled = (module.path, module.at_input)
            scales[scaled] = (*scales.get(scaled, ()), Scale(index, own[0]))
            kinds.append(scaled)
    form = (version.layout.dtype, hash(tuple(kinds)))
    return LoadedAdapter(by_path, scales, tuple(weights), dtype, form, next(_serials))


class PassAdapters(Protocol):
    """Adapters of the requests in a pass. A member is a request's index in its batch."""

    @property
    def form(self) -> tuple[object, ...]:
        """Key of the size of the pass's graph, beside the form of its inputs."""
        ...

    @property
    def storages(self) -> Collection[int]:
        """Addresses of weights that a graph refers to, and that the versions account for."""
        ...

    def adapted_input(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Return the input that the linear layer at `path` computes with."""
        ...

    def adapted_output(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        """Return the adapted output of the linear layer at `path`. `x`: the input that it computed `output` with."""
        ...

    def leaves(self, members: Collection[int]) -> list[torch.Tensor]:
        """Return the leaves of autograd whose gradients make up those of the members' adapters."""
        ...

    def flat_gradients(self, members: Collection[int], at_leaves: Sequence[torch.Tensor | None]) -> FlatGradients:
        """Return the flat gradients of the members' adapters. `at_leaves`: gradients of `leaves(members)`, None for
        zeros."""
        ...


@dataclass(frozen=True, slots=True)
class RequestAdapter:
    """Adapter of one request: an `AdapterUse` on the trunk's device."""

    adapter: LoadedAdapter
    dropout_seed: int | None
    trains: bool  # its weights need gradients

    @property
    def drops(self) -> bool:
        """True if dropout is active."""
        return self.dropout_seed is not None

    def adapts_output(self, path: str) -> bool:
        """Return whether `adapted_output` changes the output of the layer at `path`."""
        return path in self.adapter.by_path or (path, False) in self.adapter.scales

    def adapted_input(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Scale the input, in the order of operations of PEFT's IA³."""
        if (path, True) not in self.adapter.scales:
            return x
        return (x.to(self.adapter.dtype) * self._factor(path, at_input=True)).to(x.dtype)

    def adapted_output(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        """Add the low-rank products, and scale, in the orders of operations of PEFT's LoRA, DoRA and IA³.

        PEFT's layers for bitsandbytes convert each product of LoRA to the dtype of the output before they add it, and
        the sum with each of DoRA after that.
        """
        result = output
        for entry in self.adapter.by_path.get(path, ()):
            a, b = self._weight(entry.a), self._weight(entry.b)
            bias = None if entry.bias is None else self._weight(entry.bias)
            x = x.to(a.dtype)
            factors = self.dropout(entry.index, entry.dropout, x.shape[:-1].numel(), x.shape[-1])
            dropped = x if factors is None else x * factors.view(x.shape)
            if entry.magnitude is None:
                product = F.linear(F.linear(dropped, a), b, bias) * entry.scaling
                result = result + (product.to(output.dtype) if layer.quantized else product)
                continue
            scale = (self._weight(entry.magnitude.vector) / entry.magnitude.row_norms).view(1, -1)
            product = F.linear(F.linear(dropped, a), b)
            if factors is not None:
                base = layer.product(dropped)
            else:
                base = result if layer.bias is None else result - layer.bias
            result = result + ((scale - 1) * base + scale * product * entry.scaling)
            if layer.quantized:
                result = result.to(output.dtype)
        result = result.to(output.dtype)
        if (path, False) in self.adapter.scales:
            result = (result * self._factor(path, at_input=False)).to(output.dtype)
        return result

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, without gradient if this request needs none."""
        return weight if self.trains else weight.detach()

    def _factor(self, path: str, *, at_input: bool) -> torch.Tensor:
        """Return the product of the vectors `[features]` on inputs or outputs of a layer."""
        vectors = [scale.vector for scale in self.adapter.scales[path, at_input]]
        product = prod(vectors[1:], start=vectors[0])
        return product if self.trains else product.detach()

    def dropout(self, index: int, dropout: float, tokens: int, inputs: int) -> torch.Tensor | None:
        """Return the factors `[tokens, inputs]` of a module's dropout on this request's tokens; None without dropout.

        They depend on the seed and the module's index in the layout only, so that a recomputation draws the same.
        """
        if self.dropout_seed is None or not dropout:
            return None
        device, keep = self.adapter.weights[0].device, 1 - dropout
        seed = xxhash.xxh3_64_intdigest(struct.pack("<QQ", self.dropout_seed, index))
        random = torch.Generator(device).manual_seed(seed)
        factors = torch.empty(tokens, inputs, device=device).bernoulli_(keep, generator=random).div_(keep)
        return factors.to(self.adapter.dtype)


@dataclass(frozen=True, slots=True)
class Span:
    """Adjacent tokens of a pass: those of the request `member`, or padding (`member` is None)."""

    tokens: int
    member: int | None
    adapter: RequestAdapter | None


class SeparateAdapters:
    """Adapters of a pass, each computed on its own request's tokens."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._of_members = {
            span.member: span.adapter for span in spans if span.member is not None and span.adapter is not None
        }

    @property
    def form(self) -> tuple[object, ...]:
        return tuple(span.adapter and (*span.adapter.adapter.form, span.adapter.drops) for span in self._spans)

    @property
    def storages(self) -> Collection[int]:
        adapters = self._of_members.values()
        return {address for of_one in adapters for address in of_one.adapter.storages}

    def adapted_input(self, path: str, x: torch.Tensor) -> torch.Tensor:
        adapters = [of_one for of_one in self._of_members.values() if (path, True) in of_one.adapter.scales]
        if self._is_of_one(x):
            return adapters[0].adapted_input(path, x) if adapters else x
        if not adapters:
            # A node of its own, as with a neighbour's IA³: gradients at a shared input are added in the same order.
            return x.view_as(x)
        parts = zip(self._spans, x.flatten(0, 1).split([span.tokens for span in self._spans]), strict=True)
        results = [span.adapter.adapted_input(path, part.clone()) if span.adapter else part for span, part in parts]
        return torch.cat(results).view(x.shape)

    def adapted_output(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        adapters = [of_one for of_one in self._of_members.values() if of_one.adapts_output(path)]
        if not adapters:
            return output
        if self._is_of_one(x):
            return adapters[0].adapted_output(path, x, output, layer)
        sizes = [span.tokens for span in self._spans]
        results = []
        parts = zip(self._spans, x.flatten(0, 1).split(sizes), output.flatten(0, 1).split(sizes), strict=True)
        for span, part, result in parts:
            if span.adapter in adapters:
                # A copy is aligned: a request's rounding must not depend on its place in the pass.
                result = span.adapter.adapted_output(path, part.clone(), result, layer)
            results.append(result)
        return torch.cat(results).view(output.shape)

    def _is_of_one(self, x: torch.Tensor) -> bool:
        """Return whether all tokens of a layer's input are of the one request with an adapter."""
        return len(self._of_members) == 1 and (len(self._spans) == 1 or x.ndim != 3)

    def leaves(self, members: Collection[int]) -> list[torch.Tensor]:
        return [weight for member in members for weight in self._of_members[member].adapter.weights]

    def flat_gradients(self, members: Collection[int], at_leaves: Sequence[torch.Tensor | None]) -> FlatGradients:
        found, rest = {}, iter(at_leaves)
        for member in members:
            weights = self._of_members[member].adapter.weights
            found[member] = flat([gradient_or_zeros(weight, next(rest)) for weight in weights])
        return found


def gradient_or_zeros(weight: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient of a weight; zeros if it is None, for a layer that was not called."""
    return torch.zeros_like(weight) if gradient is None else gradient


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate the elements of tensors."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def request_adapter(
    use: AdapterUse, layers: Mapping[str, FrozenLinear], device: torch.device, *, trains: bool
) -> RequestAdapter:
    """Return the adapter of a request on a device, loaded if it is not yet. `layers`: by path."""
    return RequestAdapter(loaded(use.version, layers, device), use.dropout_seed, trains)
