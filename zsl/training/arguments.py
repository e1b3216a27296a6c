"""`[train]` as `TrainingArguments`, with what would show only when the training has begun found out before."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainingArguments

from zsl.errors import ConfigError
from zsl.training.config import TrainConfig
from zsl.training.foreign import make_foreign

LARGEST_SEED = 2**32 - 1  # of numpy's
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "seed": 0,
}


def trainer_arguments(config: TrainConfig, where: str) -> TrainingArguments:
    """Raises `ConfigError` for what is no key or no value of a key; `where` is the place of the configuration."""
    # Trainer lets a CPU compute in bfloat16 only if it is asked for by name.
    device = {"use_cpu": True} if not torch.accelerator.is_available() else {}
    arguments = make_foreign(TrainingArguments, where, "train", {**device, **config.trainer_arguments})
    _check_numbers(arguments, where)
    arguments.dataloader_pin_memory = arguments.dataloader_pin_memory and torch.cuda.is_available()
    # Trainer would show the mean of the earlier losses for one that is not finite.
    arguments.logging_nan_inf_filter = False
    return arguments


def _check_numbers(arguments: TrainingArguments, where: str) -> None:
    def refuse(key: str, needed: str) -> None:
        value: Any = getattr(arguments, key)
        raise ConfigError(f"{where}: train.{key} = {value!r}: {needed} is needed")

    for key, least in AT_LEAST.items():
        if not least <= getattr(arguments, key) < math.inf:
            refuse(key, f"a number of {least} or more")
    if arguments.seed > LARGEST_SEED:
        refuse("seed", f"a number of at most {LARGEST_SEED}")
    if not 0 < arguments.num_train_epochs < math.inf:
        refuse("num_train_epochs", "a number over 0")
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        refuse("max_steps", "a number of 1 or more, or -1 for as many as train.num_train_epochs gives,")
