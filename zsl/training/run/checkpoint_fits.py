"""Check that a checkpoint's adapter has the tensor names and shapes that the configuration gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from zsl.errors import ConfigError
from zsl.split.no_weights import FOR_ALL_LAYERS
from zsl.split.peft_model import active_adapter
from zsl.split.slots import empty_slots
from zsl.split.stack import find_stack
from zsl.text.first_line import first_line


def check_fits(checkpoint: Path, model: PeftModel) -> None:
    """Raise `ConfigError`, with the first mismatched tensor, if a checkpoint cannot be loaded into `model`."""
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return  # Trainer's own error names the missing file
    state = get_peft_model_state_dict(model, adapter_name=active_adapter(model), save_embedding_layers=False)
    here = {name: list(tensor.shape) for name, tensor in state.items()}
    base: Any = model.get_base_model()
    stack = find_stack(base)
    in_the_trunk = tuple(f".{stack.name}.{index}." for index in empty_slots(stack))
    own = model.state_dict()
    try:
        with safe_open(file, "pt") as tensors:
            there = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
            # Other programs may save unchanged embeddings with the adapter.
            copies = {
                name
                for name in there.keys() & own.keys() - here.keys()
                if there[name] == list(own[name].shape) and torch.equal(tensors.get_tensor(name), own[name].cpu())
            }
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}") from error
    names = (here.keys() | there.keys()) - copies
    if whole := sorted(name for name in names if any(map(name.__contains__, in_the_trunk))):
        raise ConfigError(
            f"{checkpoint} has weights on the trunk's layers, {len(whole)} of {len(there)}, as {whole[0]}: "
            f"{FOR_ALL_LAYERS}"
        )
    for name in sorted(names):
        if here.get(name) != there.get(name):
            raise ConfigError(
                f"{checkpoint} holds an adapter of another shape than [peft] gives: {name} is "
                f"{there.get(name, 'missing')} there, {here.get(name, 'missing')} here; set [peft] as it was"
            )
