"""Attach an adapter to a split model: a new one, or one from a file.

PEFT does the work. The checks that it lacks are added: that the modules named in the configuration, and the weights in
the file, are in this model, and that the trunk computes the adapters on its layers.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zsl.adapters.embeddings import SAVE_BY_ZSL, own_weights, without_copies
from zsl.adapters.save import ONLY_TO_USE
from zsl.errors import ConfigError, ModelError, ZslError
from zsl.models.hub import why_offline
from zsl.split.no_weights import FOR_ALL_LAYERS, MERGE_FIRST
from zsl.split.peft_model import active_adapter, unwrapped
from zsl.split.slots import empty_slots, trunk_slots
from zsl.split.stack import Stack, find_stack
from zsl.split.trunk_lora import check_adapters_in_trunk
from zsl.text.first_line import first_line

_LIKE_AN_ADAPTERS_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ALL = 'for adapters on its layers set layers="all"'
# Keys of LoRA that read or train weights of the base model, or have variants.
_BEYOND_PLAIN_LORA = ("bias", "init_lora_weights", "modules_to_save", "target_parameters", "use_dora")
# Exceptions that PEFT, and torch below it, raise for a configuration that does not match the model.
_FOREIGN = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError, re.error)


def with_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Attach a new adapter to the model and freeze the rest. Changes the model in place, but not `config`.

    Raises `ConfigError` for a configuration that names layers or modules of the trunk that are not in this model, that
    matches no module, that needs the trunk's weights or puts there what the trunk does not compute, or that PEFT cannot
    apply to this model or its quantized weights.
    """
    made: Any = copy.deepcopy(config)
    if hasattr(made, "fan_in_fan_out") and not getattr(made, "target_parameters", None):
        made.fan_in_fan_out |= any(isinstance(module, Conv1D) for module in model.modules())
    method = made.peft_type.value
    try:
        _check_names(model, made)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT corrects it for each module
            adapted: PeftModel = get_peft_model(model, made)
        check_adapters_in_trunk(model)
    except ModelError as error:
        raise ConfigError(f"{_as_configured(config)}: {error}") from error
    except _FOREIGN as error:
        if isinstance(error, ZslError):
            raise
        if isinstance(error, ValueError) and _adapts_layers_of_the_trunk_only(model, config):
            raise ConfigError(
                f"{method} has no layer to adapt, as all are in the cut: make that smaller, or name in target_modules "
                f"some of the other modules: {', '.join(_modules(model))}"
            ) from error
        raise ConfigError(f"{method} cannot be put on this model: {_in_words(error)}") from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ConfigError(f"{method} finds nothing to train in this model")
    layers = (module for module in adapted.modules() if isinstance(module, BaseTunerLayer))
    if not all(_supports_its_weights(layer) for layer in layers):
        # Some methods would fail, others compute wrong results.
        raise ConfigError(f"PEFT has no layers of {method} for quantized weights")
    return adapted


def load_adapter(model: PreTrainedModel, directory: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Attach the adapter in `directory`, as `PeftModel.from_pretrained` does for a whole model.

    Changes the model in place. Raises `ModelError` if the adapter has weights on layers of the trunk that are not in
    this model, which PEFT would drop silently, or adapters there that the trunk does not compute, if weights are
    missing, or if it cannot be read, or not be trained although `is_trainable`.
    """
    model = unwrapped(model)
    place = str(directory)
    config: Any = read_adapter_config(place)
    stack = find_stack(model)
    inside = tuple(f".{stack.name}.{index}." for index in empty_slots(stack))
    try:
        if is_trainable and config.peft_type in ONLY_TO_USE:
            raise ModelError(f"the adapter in {place} does not hold all that {config.peft_type.value} trains")
        weights = load_peft_weights(place, device="cpu")
        _refuse(
            place,
            "weights on the trunk's layers",
            {name for name in weights if any(map(name.__contains__, inside))},
            FOR_ALL_LAYERS,
        )
        own = own_weights(weights, config, model)
        resized = own.rows - {getattr(model, "embedding_rows", None)}
        if resized and own.lacking:
            raise ModelError(
                f"the adapter in {place} is of a model that was resized to {max(resized)} tokens, and lacks "
                f"{own.lacking}: {SAVE_BY_ZSL}"
            )
        config.inference_mode = not is_trainable
        try:
            adapted: PeftModel = get_peft_model(model, config)
            check_adapters_in_trunk(model)
        except ModelError as error:
            raise ModelError(f"the adapter in {place} cannot be loaded: {error}; {MERGE_FIRST}") from error
        name = active_adapter(adapted)
        wanted = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        weights = without_copies(weights, wanted)
        # PEFT's own files may hold embeddings beside the adapter.
        _refuse(place, "weights that match no module", weights.keys() - wanted.keys() - adapted.state_dict().keys())
        _refuse(place, "no weights where its configuration wants some", wanted.keys() - weights.keys())
        set_peft_model_state_dict(adapted, weights, adapter_name=name)
    except (OSError, SafetensorError, *_FOREIGN) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the adapter in {place} cannot be loaded: {_in_words(error)}") from error
    return adapted if is_trainable else adapted.eval()


def read_adapter_config(place: str) -> PeftConfig:
    """Read the configuration of an adapter from a directory or the hub. Raises `ModelError`."""
    offline = None
    if not Path(place).is_dir():
        if not _LIKE_AN_ADAPTERS_HUB_ID.fullmatch(place):
            raise ModelError(f"the adapter in {place} cannot be loaded: there is no such directory")
        offline = why_offline()  # checked once here; PEFT would wait for the hub for tens of seconds
    try:
        config: PeftConfig = PeftConfig.from_pretrained(place)
    except (OSError, *_FOREIGN) as error:
        reason = f"there is no such directory, it is not cached here, and {offline}" if offline else _in_words(error)
        raise ModelError(f"the adapter in {place} cannot be loaded: {reason}") from error
    return config


def _check_names(model: PreTrainedModel, config: Any) -> None:
    """Raise `ConfigError` for names of layers and modules that are in the trunk only, and if no other is named."""
    stack = find_stack(model)
    trunk = empty_slots(stack)
    if config.is_adaption_prompt:
        behind = len(stack.layers) - 1 - max(trunk_slots(stack), default=-1)
        if (config.adapter_layers or 0) > behind:  # counted from the end, it would reach into the trunk
            raise ConfigError(f"adapter_layers = {config.adapter_layers}: {behind} layers are behind the trunk")
        return
    asked = getattr(config, "layers_to_transform", None)
    layers = {asked} if isinstance(asked, int) else set(asked or ())
    inside = sorted(layers.intersection(trunk))
    if inside:
        raise ConfigError(f"layers_to_transform = {asked}: {inside} are in the trunk; {_ALL}")
    here = [name for name, _ in model.named_modules() if name]
    there = _names_in_the_trunk(stack, trunk)
    for key in ("target_modules", "modules_to_save"):
        names = getattr(config, key, None) or ()
        for name in () if isinstance(names, str) else sorted(names):
            if _fits(name, there) and not _fits(name, here):
                raise ConfigError(f"{key}: {name!r} is in the trunk; {_ALL}")
            if key == "modules_to_save" and not _fits(name, here):
                raise ConfigError(f"{key}: there is no {name!r}; there are {', '.join(_modules(model))}")
    targets = getattr(config, "target_modules", None)
    if targets and targets != "all-linear" and not any(check_target_module_exists(config, name) for name in here):
        shown, known = targets if isinstance(targets, str) else sorted(targets), _modules(model)
        hint = f"there are {', '.join(known)}"
        if shown in known:
            hint = f'a string is a pattern for whole paths; write ["{shown}"]'
        raise ConfigError(f"target_modules = {shown} matches no module{' outside the trunk' if trunk else ''}; {hint}")


def _adapts_layers_of_the_trunk_only(model: PreTrainedModel, config: Any) -> bool:
    """Return whether PEFT chooses the modules, which it looks for in layers, and the trunk has all layers."""
    stack = find_stack(model)
    left_to_peft = getattr(config, "target_modules", ()) in (None, "all-linear")
    return left_to_peft and len(empty_slots(stack)) == len(stack.layers)


def _as_configured(config: Any) -> str:
    """Return the name of the method, with the keys by which it is more than plain LoRA."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    values = {key: getattr(config, key) for key in _BEYOND_PLAIN_LORA if key in defaults}
    said = [f"{key} = {value!r}" for key, value in values.items() if value != defaults[key]]
    return f"{config.peft_type.value}{' with ' if said else ''}{', '.join(said)}"


def _in_words(error: BaseException) -> str:
    """Return the text of a foreign error, with its type where the text alone is unclear."""
    if isinstance(error, re.error) and error.pattern is not None:
        return f"{str(error.pattern)!r} is not a regular expression: {error}"
    return f"{type(error).__name__}: {first_line(error)}" if isinstance(error, LookupError) else first_line(error)


def _supports_its_weights(layer: BaseTunerLayer) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight is None or weight.is_floating_point() or type(layer).__module__.endswith(".bnb")


def _names_in_the_trunk(stack: Stack, trunk: list[int]) -> set[str]:
    """Return the names of the trunk's modules, on the assumption that its layers are like the others."""
    outside = [layer for index, layer in enumerate(stack.layers) if index not in trunk]
    within = {name for layer in outside for name, _ in layer.named_modules()}
    return {f"{stack.name}.{index}.{name}".rstrip(".") for index in trunk for name in within}


def _fits(name: str, modules: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _modules(model: PreTrainedModel) -> list[str]:
    """Return the last components of the names of modules that have parameters."""
    owners = (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    return sorted({name.rpartition(".")[2] for name in owners})


def _refuse(place: str, what: str, names: Iterable[str], instead: str = "") -> None:
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(f"the adapter in {place} has {what}: {', '.join(found[:3])}{more}{instead and '; '}{instead}")
