"""Find the adapters of the trunk's layers in a client's model (LoRA, DoRA, IA³, prefix), and make versions of them.

PEFT's modules are read, not run: the daemon computes what they would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from peft.tuners.ia3.layer import Linear as Ia3Linear
from pydantic import ValidationError

from zsl.client.prefix import Prefix
from zsl.client.replayable_step import CallAdapter
from zsl.errors import AdapterError, ModelError
from zsl.link.adapter_versions import NO_ADAPTERS, EncodedAdapter
from zsl.split.ghosts import WAY_OUT
from zsl.split.trunk_lora import Computed, Slots, active_adapters, not_sent
from zsl.wire.adapter_layout import AdaptedModule, AdapterLayout, Ia3Module, LoraModule, PrefixLayer, version_of
from zsl.wire.messages import AdapterLimits, FloatDtypeName
from zsl.wire.tensors import TORCH_DTYPES, encode_tensor, float_wire_name

MAX_SEED = 2**53
FLOAT_DTYPES = {TORCH_DTYPES[name] for name in get_args(FloatDtypeName)}

MODULES: dict[str, type[LoraModule] | type[Ia3Module] | type[PrefixLayer]] = {
    "lora": LoraModule,
    "ia3": Ia3Module,
    "prefix": PrefixLayer,
}
DROPOUT = tuple(LoraModule.model_fields).index("dropout")

Module = tuple[Any, ...]  # fields of an `AdaptedModule`, in their order: the method is the first


@dataclass(frozen=True, slots=True)
class Found:
    """Active adapters on the trunk's layers. `weights`: flat `[elements]`, in the layout's order, differentiable."""

    layout: AdapterLayout
    encoded_layout: bytes
    weights: torch.Tensor
    has_dropout: bool  # in force now

    def check_limits(self, limits: AdapterLimits | None, wire_dtype: torch.dtype | None) -> None:
        """Raise `ModelError` if the daemon accepts no adapters, `AdapterError` for one over its limits."""
        if limits is None:
            raise ModelError(NO_ADAPTERS)
        for module in self.layout.modules:
            if isinstance(module, LoraModule) and module.rank > limits.max_rank:
                raise AdapterError(
                    f"the adapter on {module.path} has rank {module.rank}, over the daemon's limit of "
                    f"{limits.max_rank}: choose a smaller r, or start the daemon with a larger --max-adapter-rank"
                )
        nbytes = self.layout.elements * (wire_dtype or self.weights.dtype).itemsize
        if nbytes > limits.max_bytes:
            raise AdapterError(
                f"the adapter on the trunk's layers has {nbytes:,} bytes, over the daemon's limit of "
                f"{limits.max_bytes:,}: choose a smaller r, fewer modules or virtual tokens, or "
                "adapter_wire_dtype=torch.bfloat16"
            )


class TrunkAdapters:
    """Adapters of one model's trunk. Keeps the newest layout and version, which most calls have again."""

    def __init__(self) -> None:
        self._layout: tuple[tuple[object, ...], AdapterLayout, bytes] | None = None
        self._version: EncodedAdapter | None = None

    def find(self, slots: Slots, prefix: Prefix | None = None) -> Found | None:
        """Find the active adapters; None without any. Raises `ModelError` for one that cannot be sent."""
        modules: list[Module] = []
        parameters: list[torch.Tensor] = []
        drops: list[bool] = []
        for tuner, adapter, path in active_adapters(slots):
            drops.append(_add(tuner, adapter, path, modules, parameters))
        for index, (keys, values) in (prefix or {}).items():
            rows, heads, tokens, dim = keys.shape
            modules.append(("prefix", str(index), rows, tokens, heads, dim))
            parameters += [tensor.transpose(1, 2) for tensor in (keys, values)]
            drops.append(False)
        if not parameters:
            return None
        if any(drops):
            # Those in evaluation mode beside others have none. (If all are, the seed says so: the version stays.)
            modules = [
                module if drop or module[0] != "lora" else (*module[:DROPOUT], 0.0, *module[DROPOUT + 1 :])
                for module, drop in zip(modules, drops, strict=True)
            ]
        dtypes = {parameter.dtype for parameter in parameters}
        if len(dtypes) > 1 or not dtypes <= FLOAT_DTYPES:
            raise not_sent("the trunk", f"weights of {' and '.join(sorted(map(str, dtypes)))}")
        layout, encoded = self._layout_of(tuple(modules), dtypes.pop())
        flat = torch.cat([parameter.reshape(-1) for parameter in parameters])
        return Found(layout, encoded, flat, any(drops))

    def version(self, found: Found, wire_dtype: torch.dtype | None) -> EncodedAdapter:
        """Return the version of the weights as they are now: the last one, if they are the same."""
        descriptor, weights = encode_tensor("weights", found.weights.detach().to(wire_dtype or found.weights.dtype))
        dtype: Any = descriptor.dtype
        digest = version_of(found.encoded_layout, dtype, weights)
        last = self._version
        if last is None or last.digest != digest:
            last = self._version = EncodedAdapter(digest, found.encoded_layout, dtype, weights)
        return last

    def for_call(self, found: Found, wire_dtype: torch.dtype | None) -> CallAdapter:
        """Return the adapter of one forward, with a seed drawn by torch's generator if a dropout is in force."""
        seed = int(torch.randint(0, MAX_SEED, ())) if found.has_dropout else None
        return CallAdapter(self.version(found, wire_dtype), seed)

    def _layout_of(self, modules: tuple[Module, ...], dtype: torch.dtype) -> tuple[AdapterLayout, bytes]:
        key, last = (dtype, *modules), self._layout
        if last is not None and last[0] == key:
            return last[1:]
        try:
            adapted = tuple(map(_validated, modules))
            layout = AdapterLayout(dtype=float_wire_name(dtype), modules=adapted)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ModelError(
                f"an adapter on the trunk's layers cannot be sent there: {'.'.join(map(str, first['loc']))}: "
                f"{first['msg']} ({first['input']!r}); {WAY_OUT}"
            ) from None
        encoded = layout.encoded()
        self._layout = key, layout, encoded
        return layout, encoded


def _validated(module: Module) -> AdaptedModule:
    cls = MODULES[module[0]]
    return cls.model_validate(dict(zip(cls.model_fields, module, strict=True)))


def _add(tuner: Computed, adapter: str, path: str, modules: list[Module], parameters: list[torch.Tensor]) -> bool:
    """Add one adapter's module and parameters. Return whether its dropout is in force."""
    named: Any = tuner._modules
    if isinstance(tuner, Ia3Linear):
        vector = named["ia3_l"]._parameters.get(adapter)
        if vector is None:
            raise not_sent(path, "a parametrized adapter")
        modules.append(("ia3", path, tuner.in_features, tuner.out_features, bool(tuner.is_feedforward)))
        parameters.append(vector)
        return False
    of_a, of_b = (named[name]._modules[adapter]._parameters for name in ("lora_A", "lora_B"))
    dropout = named["lora_dropout"]._modules[adapter]
    a, b, bias = of_a.get("weight"), of_b.get("weight"), of_b.get("bias")
    if a is None or b is None:
        raise not_sent(path, "a parametrized adapter")
    (rank, inputs), outputs = a.shape, b.shape[0]
    probability = float(vars(dropout).get("p", 0.0))  # an Identity has none
    magnitude = None
    if adapter in tuner.lora_variant:  # DoRA
        magnitude = named["lora_magnitude_vector"]._modules[adapter]._parameters["weight"]
    scaling = float(tuner.scaling[adapter])
    has = bias is not None, magnitude is not None
    modules.append(("lora", path, inputs, outputs, rank, scaling, probability, *has))
    parameters += (one for one in (a, b, bias, magnitude) if one is not None)
    return probability > 0 and dropout.training
