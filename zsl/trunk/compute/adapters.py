"""Adapters of the requests in a pass: LoRA, DoRA and IA³ on the trunk's linear layers, and prefixes of its layers.

`SeparateAdapters`: each request's adapter is computed on its own tokens, in PEFT's order of operations. A
request that runs alone gets the numbers of a local PEFT model bit for bit; in a deterministic pass a request's numbers
do not depend on its neighbours. `zsl.trunk.compute.merged_adapters` computes all requests at once.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
import xxhash
from transformers import Cache

from zsl.trunk.adapter import AdapterUse
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.loaded_adapter import LoadedAdapter, loaded
from zsl.trunk.compute.prefix import PrefixCache

# Gradients of the flat weights of each request's adapter, in the dtype of their computation, by index of the request.
FlatGradients = dict[int, torch.Tensor]


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

    def prefix_cache(self) -> Cache | None:
        """Return the keys and values in front of those of the pass; None without a prefix."""
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
        return path in self.adapter.entries.by_path or (path, False) in self.adapter.entries.scales

    def adapted_input(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Scale the input, in the order of operations of PEFT's IA³."""
        if (path, True) not in self.adapter.entries.scales:
            return x
        return (x.to(self.adapter.dtype) * self._factor(path, at_input=True)).to(x.dtype)

    def adapted_output(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        """Add the low-rank products, and scale, in the orders of operations of PEFT's LoRA, DoRA and IA³.

        PEFT's layers for bitsandbytes convert each product of LoRA to the dtype of the output before they add it, and
        the sum with each of DoRA after that.
        """
        result = output
        for entry in self.adapter.entries.by_path.get(path, ()):
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
        if (path, False) in self.adapter.entries.scales:
            result = (result * self._factor(path, at_input=False)).to(output.dtype)
        return result

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, without gradient if this request needs none."""
        return weight if self.trains else weight.detach()

    def _factor(self, path: str, *, at_input: bool) -> torch.Tensor:
        """Return the product of the vectors `[features]` on inputs or outputs of a layer."""
        vectors = [scale.vector for scale in self.adapter.entries.scales[path, at_input]]
        product = prod(vectors[1:], start=vectors[0])
        return product if self.trains else product.detach()

    def dropout(self, index: int, dropout: float, tokens: int, inputs: int) -> torch.Tensor | None:
        """Return the factors `[tokens, inputs]` of a module's dropout on this request's tokens; None without dropout.

        They depend on the seed and the module's index in the layout only, so that a recomputation draws the same.
        """
        if self.dropout_seed is None or not dropout:
            return None
        device, keep = self.adapter.flat.device, 1 - dropout
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
        return {address for of_one in adapters for address in of_one.adapter.entries.storages}

    def prefix_cache(self) -> Cache | None:
        for of_one in self._of_members.values():  # only one, as a request with a prefix runs alone
            if of_one.adapter.entries.prefix:
                return PrefixCache(of_one.adapter.entries.prefix, trains=of_one.trains)
        return None

    def adapted_input(self, path: str, x: torch.Tensor) -> torch.Tensor:
        adapters = [of_one for of_one in self._of_members.values() if (path, True) in of_one.adapter.entries.scales]
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
        return [weight for member in members for weight in self._of_members[member].adapter.entries.weights]

    def flat_gradients(self, members: Collection[int], at_leaves: Sequence[torch.Tensor | None]) -> FlatGradients:
        found, rest = {}, iter(at_leaves)
        for member in members:
            weights = self._of_members[member].adapter.entries.weights
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
