"""The adapter that comes out of a split model: a PEFT adapter of the whole model, with nothing renamed.

A split model keeps the true layer indices, so the keys are right already. What is added is the configuration that
keeps PEFT from making empty adapters on the trunk's layers when it loads the file on the whole model.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file

from zsl.errors import ModelError, RunFailed
from zsl.split.durable import aside, sync, sync_tree
from zsl.split.reference import first_line
from zsl.split.sides import Side, Sides
from zsl.split.stack import Stack, find_stack

PEFT_PREFIX = "base_model.model."


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    *,
    base_model: str | None = None,
    sides: Sides | None = None,
    only: Side | None = None,
) -> None:
    """Write the adapter of a split model as a PEFT adapter of the whole one.

    `base_model` is the hub id that the file shall name. With `sides` and `only`, just the part of that side.
    The files are written aside, brought to the disk and renamed: older ones are there until the new ones are whole.
    Raises `ModelError` if nothing is there to save, `RunFailed` if it cannot be written.
    """
    target = Path(directory)
    try:
        with aside(target.parent) as written:
            write_adapter(model, written, base_model=base_model, sides=sides, only=only)
            sync_tree(written)
            target.mkdir(exist_ok=True)
            for file in sorted(written.iterdir()):
                os.replace(file, target / file.name)
        sync(target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"the adapter could not be written to {target}: {first_line(error)}") from error


def write_adapter(
    model: PeftModel,
    directory: Path,
    *,
    base_model: str | None = None,
    sides: Sides | None = None,
    only: Side | None = None,
) -> None:
    """Write the two files of an adapter into an empty directory, in place. Raises `ModelError` if it has no weights."""
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    if sides is not None and only is not None:
        state = {key: t for key, t in state.items() if sides.side_of(key.removeprefix(PEFT_PREFIX)) == only}
    if not state:
        raise ModelError(f"the adapter has no weights on the {only} side" if only else "the adapter has no weights")
    config = _whole_model_config(model, state.keys())
    config.base_model_name_or_path = base_model
    config.save_pretrained(str(directory))
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    for file in directory.iterdir():
        file.chmod(0o644)


def _whole_model_config(model: PeftModel, keys: Collection[str]) -> PeftConfig:
    config: Any = copy.deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    base: Any = model.get_base_model()
    stack = find_stack(base)
    adapted = sorted(
        name
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and any(f"{name}." in key for key in keys)
    )
    if any(getattr(base.get_submodule(name), "fan_in_fan_out", False) for name in adapted):
        config.fan_in_fan_out = True
    indices = {_layer_index(name, stack) for name in adapted}
    targets = config.target_modules
    if None in indices or isinstance(targets, str) or any(name in targets for name in adapted):
        # PEFT narrows names by layers_to_transform, but neither a pattern, nor whole paths, nor what is outside the
        # layers. Whole paths say it all.
        config.target_modules = set(adapted)
        config.layers_to_transform = config.layers_pattern = None
    else:
        config.layers_to_transform = sorted(index for index in indices if index is not None)
        config.layers_pattern = stack.leaf_name
    completed: PeftConfig = config
    return completed


def _layer_index(module_path: str, stack: Stack) -> int | None:
    match = re.match(rf"{re.escape(stack.name)}\.(\d+)\.", module_path)
    return int(match[1]) if match else None


def adapter_parameters(model: PeftModel, sides: Sides, side: Side) -> int:
    """The number of trainable parameters on a side."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and sides.side_of(name.removeprefix(PEFT_PREFIX)) == side
    )
