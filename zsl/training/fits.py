"""Whether the adapter of a checkpoint is of the shape that a configuration gives."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from zsl.errors import ConfigError
from zsl.split.reference import first_line
from zsl.training.checkpoints import CHECKSUMS


def check_fits(checkpoint: Path, model: PeftModel) -> None:
    """Raises `ConfigError` if a checkpoint cannot be loaded into `model`, with the first tensor that does not fit."""
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return  # what Trainer says of it names it
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    here = {name: list(tensor.shape) for name, tensor in state.items()}
    try:
        with safe_open(file, "pt") as tensors:
            there = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}") from error
    # Others may save embeddings beside the adapter.
    names = here.keys() | there.keys() if (checkpoint / CHECKSUMS).is_file() else here.keys()
    for name in sorted(names):
        if here.get(name) != there.get(name):
            raise ConfigError(
                f"{checkpoint} holds an adapter of another shape than [peft] gives: {name} is "
                f"{there.get(name, 'missing')} there, {here.get(name, 'missing')} here; set [peft] as it was"
            )
