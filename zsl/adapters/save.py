"""Save the adapter of a split model as a PEFT adapter of the whole model.

A split model keeps the true layer indices, so no key is renamed. The configuration is narrowed to the modules that
have weights, if some that it names have none, so that PEFT adds no empty adapters to the trunk's layers when it loads
the file on the whole model.
tests/test_peft_methods.py checks this for every PEFT method that `zsl.training.config.peft_table` accepts.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import save_file

from zsl.errors import ModelError, RunFailed
from zsl.files.durable import aside, reason, sync, sync_tree
from zsl.split.peft_model import active_adapter, base_weights, unwrapped
from zsl.split.sides import Side, Sides
from zsl.split.slots import empty_slots
from zsl.split.stack import Stack, find_stack

# Methods whose file holds the output of an encoder, not the encoder: it can be used, but not trained further.
ONLY_TO_USE = frozenset({"CPT", "P_TUNING"})


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    *,
    base_model: str | None = None,
    sides: Sides | None = None,
    only: Side | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the active adapter of a split model as a PEFT adapter of the whole one.

    Trained weights of the base model, and resized embeddings, are saved in the same file.
    `base_model` is the hub id in the configuration, by default the name that the model was loaded from. `sides` and
    `only` restrict it to the part of one side. `beside` has further files, by name, for the same directory.
    The files are written to a temporary directory, flushed to disk and renamed; older ones stay until then.
    Raises `ModelError` if the model has no adapter or no weights to save, `RunFailed` if it cannot be written.
    """
    model = unwrapped(model)
    if not hasattr(model, "get_base_model"):
        raise ModelError(f"a {type(model).__name__} has no adapter to save: make a PeftModel of it with get_peft_model")
    target = Path(directory)
    try:
        with aside(target.parent) as written:
            write_adapter(model, written, base_model=base_model, sides=sides, only=only)
            for name, content in (beside or {}).items():
                (written / name).write_bytes(content)
            sync_tree(written)
            target.mkdir(exist_ok=True)
            for file in sorted(written.iterdir()):
                os.replace(file, target / file.name)
        sync(target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"the adapter could not be written to {target}: {reason(error)}") from error


def remove_adapter(directory: Path, *beside: str) -> None:
    """Remove the files that `save_adapter` wrote, if they exist. Raises `RunFailed`."""
    try:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *beside):
            (directory / name).unlink(missing_ok=True)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    except OSError as error:
        raise RunFailed(f"the older adapter in {directory} could not be removed: {reason(error)}") from error


def write_adapter(
    model: PeftModel,
    directory: Path,
    *,
    base_model: str | None = None,
    sides: Sides | None = None,
    only: Side | None = None,
) -> None:
    """Write the two files of an adapter directly into an empty directory.

    Raises `ModelError` if the adapter has no weights, if several adapters are active, or if the part of a side cannot
    be used alone.
    """
    name = active_adapter(model)
    config: Any = copy.deepcopy(model.peft_config[name])
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state |= base_weights(model, state)
    if compiled := next((key for key in state if "_orig_mod." in key), None):
        raise ModelError(
            f"{compiled} is inside a compiled module, and PEFT would not find it: compile the PeftModel as a whole"
        )

    def wanted(name: str) -> bool:
        return sides is None or only is None or only in _sides_of(name, config, sides)

    if only and not config.is_prompt_learning and not all(name.startswith(name_prefix(config)) for name in state):
        raise ModelError(f"the layers of a {config.peft_type.value} adapter share weights: it has no {only} part")
    if only in ("trunk", "top") and config.is_prompt_learning:
        raise ModelError(f"a {config.peft_type.value} adapter is useless without its prompts: it has no {only} part")
    state = {name: tensor for name, tensor in state.items() if wanted(name)}
    if not state:
        raise ModelError(f"the adapter has no weights on the {only} side" if only else "the adapter has no weights")
    name_adapted_modules(config, model, state.keys(), lambda path: wanted(name_prefix(config) + path))
    config.inference_mode = True
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    config.save_pretrained(str(directory))
    # Copies, as safetensors refuses tensors that share memory: tied ones, and parts of one.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    for file in directory.iterdir():
        file.chmod(0o644)


def name_adapted_modules(config: Any, model: PeftModel, keys: Iterable[str], wanted: Callable[[str], bool]) -> None:
    """Narrow the configuration to the modules that have weights in the file.

    The names that the user gave also match modules in the whole model that have none: of the trunk's layers, if they
    are not in this model, or of other sides than the one that is saved.
    """
    base: Any = model.get_base_model()
    tuner: Any = model.base_model
    kept = getattr(config, "modules_to_save", None)
    if not config.is_prompt_learning and not config.is_adaption_prompt:  # they name no modules
        adapted = [name for name in tuner.targeted_module_names if check_target_module_exists(config, name)]
        _name_modules(config, base, adapted, wanted)
    if kept:
        wrapped = (name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper))
        config.modules_to_save = [name for name in wrapped if name.endswith(tuple(kept)) and wanted(name)] or None
    if getattr(config, "trainable_token_indices", None) and not any("trainable_tokens" in key for key in keys):
        config.trainable_token_indices = None
    if getattr(config, "target_parameters", None):
        config.target_parameters = [name for name in tuner.targeted_parameter_names if wanted(name)]


def _name_modules(config: Any, base: Any, adapted: list[str], wanted: Callable[[str], bool]) -> None:
    stack = find_stack(base)
    named = {name: base.get_submodule(name) for name in adapted if wanted(name)}
    if any(getattr(module, "fan_in_fan_out", False) for module in named.values()):
        config.fan_in_fan_out = True
    if len(named) == len(adapted) and not empty_slots(stack):
        return
    if getattr(config, "feedforward_modules", None):  # of IA3
        config.feedforward_modules = {name for name, module in named.items() if module.is_feedforward}
    targets = config.target_modules
    if (
        hasattr(config, "layers_to_transform")
        and named
        and not isinstance(targets, str)
        and not set(targets).intersection(adapted)
        and not getattr(config, "exclude_modules", None)
        and all(_layer_index(name, stack) is not None for name in adapted)
    ):
        # vLLM reads these keys too.
        config.layers_to_transform = sorted({_layer_index(name, stack) for name in named})
        config.layers_pattern = stack.leaf_name
        return
    # PEFT applies layers_to_transform to names, but not to a pattern, to whole paths, or to modules outside the layers.
    # Whole paths cover all cases.
    config.target_modules = set(named)
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(config, name):
            setattr(config, name, None)


def _layer_index(module_path: str, stack: Stack) -> int | None:
    match = re.match(rf"{re.escape(stack.name)}\.(\d+)\.", module_path)
    return int(match[1]) if match else None


def name_prefix(config: PeftConfig) -> str:
    """Return the prefix that PEFT adds to the names of the adapted model."""
    return "base_model." if config.is_prompt_learning else "base_model.model."


def _sides_of(name: str, config: PeftConfig, sides: Sides) -> tuple[Side, ...]:
    """Return the sides that use an adapter's tensor, given its name in the PEFT model or in the file."""
    if name.startswith(name_prefix(config)):
        return (sides.side_of(name.removeprefix(name_prefix(config))),)
    # Virtual tokens precede the text. Any other tensor outside the layers is shared by both sides.
    return ("bottom",) if config.is_prompt_learning else ("bottom", "top")


def adapter_parameters(model: PeftModel, sides: Sides, side: Side) -> int:
    """Return the number of trainable parameters on a side. Shared ones count on both sides."""
    config = model.peft_config[active_adapter(model)]
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and side in _sides_of(name, config, sides)
    )
