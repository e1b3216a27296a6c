"""Find the PEFT layers on the modules of the trunk's layers, and refuse those that the trunk does not compute.

The trunk computes LoRA without variants on linear modules, as `zsl.wire.adapter_layout` describes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from zsl.errors import ModelError
from zsl.split.ghosts import WAY_OUT, GhostWeight
from zsl.split.slots import trunk_slots
from zsl.split.stack import find_stack

Slots = Mapping[int, nn.Module]  # modules in the trunk's slots, by the index of their layer


def check_adapters_in_trunk(model: PreTrainedModel) -> None:
    """Raise `ModelError` for the first adapter on the trunk's layers that the trunk does not compute.

    `model` is a client's model, with PEFT's layers in it.
    """
    stack = find_stack(model)
    for tuner, path in tuners_in({index: stack.layers[index] for index in trunk_slots(stack)}):
        for adapter in tuner.active_adapters:
            check_is_plain_lora(tuner, adapter, path)


def tuners_in(slots: Slots) -> Iterator[tuple[Any, str]]:
    """Yield PEFT's layers in the trunk's slots, and their paths within the trunk (`7.mlp.up_proj`).

    Raises `ModelError` for weights in the slots that are not of such a layer.
    """
    for index, slot in slots.items():
        yield from _tuners(slot, str(index))


def _tuners(module: nn.Module, path: str) -> Iterator[tuple[Any, str]]:
    for name, parameter in module._parameters.items():
        if parameter is not None and not isinstance(parameter, GhostWeight):
            raise not_sent(f"{path}.{name}", "a weight of its own")
    for name, child in module._modules.items():
        if isinstance(child, BaseTunerLayer):
            yield child, f"{path}.{name}"
        elif child is not None:
            yield from _tuners(child, f"{path}.{name}")


def check_is_plain_lora(tuner: Any, adapter: str, path: str) -> None:
    """Raise `ModelError` unless an adapter of a PEFT layer is LoRA without variants on a linear module."""
    if type(tuner) is not Linear or isinstance(tuner.base_layer, BaseTunerLayer):
        raise not_sent(path, f"{type(tuner).__module__}.{type(tuner).__name__} of PEFT")
    if adapter in tuner.lora_variant:
        raise not_sent(path, type(tuner.lora_variant[adapter]).__name__)


def not_sent(path: str, what: str) -> ModelError:
    """Return the error of an adapter at `path` that cannot be sent to the trunk."""
    return ModelError(
        f"the adapter on {path} has {what}, and cannot be sent to the trunk: use plain LoRA there, of one dtype, or "
        f"{WAY_OUT}"
    )
