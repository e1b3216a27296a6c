"""Find the adapters on the modules of the trunk's layers, and refuse those that the trunk does not compute.

It computes LoRA, DoRA and IA³ on linear modules, as `zsl.wire.adapter_layout` describes them. PEFT's modules
are read, not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from peft.tuners.ia3.layer import Linear as Ia3Linear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from zsl.errors import ModelError
from zsl.split.ghosts import WAY_OUT, GhostWeight
from zsl.split.slots import trunk_slots
from zsl.split.stack import find_stack

Computed = LoraLinear | Ia3Linear  # PEFT's layers that the trunk computes
_WEIGHTS: dict[Any, str] = {LoraLinear: "lora_A", Ia3Linear: "ia3_l"}  # of one adapter each, by its name

Slots = Mapping[int, nn.Module]  # modules in the trunk's slots, by the index of their layer


def slots_of(model: PreTrainedModel) -> Slots:
    """Return the modules in the trunk's slots of a client's model."""
    stack = find_stack(model)
    return {index: stack.layers[index] for index in trunk_slots(stack)}


def check_adapters_in_trunk(model: PreTrainedModel) -> None:
    """Raise `ModelError` if the trunk does not compute an active adapter on its layers of a client's model."""
    for _ in active_adapters(slots_of(model)):
        pass


def active_adapters(slots: Slots) -> Iterator[tuple[Computed, str, str]]:
    """Yield each active adapter's PEFT layer, its name and its path within the trunk (`7.mlp.up_proj`).

    In the order of layers and modules. Raises `ModelError` for one that the trunk does not compute.
    """
    tuners: list[tuple[Any, str]] = []
    for index, slot in slots.items():
        _add_tuners(slot, str(index), tuners)
    for tuner, path in tuners:
        if tuner.disable_adapters:
            continue
        if type(tuner) not in _WEIGHTS or _is_tuner(type(tuner._modules["base_layer"])):  # type: ignore[arg-type]
            raise not_sent(path, f"{type(tuner).__module__}.{type(tuner).__name__} of PEFT")
        if "forward" in vars(tuner):
            raise not_sent(path, "a forward of its own, as X-LoRA gives it to its experts")
        if tuner.merged_adapters:
            raise not_sent(path, "a merged adapter")
        known: Any = tuner._modules[_WEIGHTS[type(tuner)]]
        for name in tuner.active_adapters:
            if name in known:
                if tuner._forward_pre_hooks or tuner._forward_hooks:
                    raise not_sent(path, "hooks, as aLoRA sets them, and adapter_names for a mixed batch")
                variant = vars(tuner).get("lora_variant", {}).get(name)
                if variant is not None and type(variant) is not DoraLinearVariant:
                    raise not_sent(path, type(variant).__name__)
                yield tuner, name, path


def not_sent(path: str, what: str) -> ModelError:
    """Return the error of an adapter that cannot be sent to the trunk."""
    return ModelError(
        f"the adapter on {path} has {what}, and cannot be sent to the trunk: use LoRA, DoRA or IA³ there, of one "
        f"dtype, or {WAY_OUT}"
    )


def _add_tuners(module: nn.Module, path: str, tuners: list[tuple[Any, str]]) -> None:
    """Add PEFT's layers within a module, and their paths. Raises `ModelError` for other weights."""
    # Plain types and dicts, because this runs in each forward: isinstance is slow for these classes.
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not GhostWeight:
            raise not_sent(f"{path}.{name}", "a weight of its own")
    for name, child in module._modules.items():
        if child is None:
            continue
        if _is_tuner(type(child)):  # type: ignore[arg-type]
            tuners.append((child, f"{path}.{name}"))
        elif child._modules or child._parameters:
            _add_tuners(child, f"{path}.{name}", tuners)


@cache
def _is_tuner(cls: Any) -> bool:
    return issubclass(cls, BaseTunerLayer)
