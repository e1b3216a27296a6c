"""Make `TrainingArguments` of `[train]`, and find errors that Trainer would raise only in training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from zsl.errors import ConfigError
from zsl.training.config.config import TrainConfig
from zsl.training.config.third_party import make_foreign

LARGEST_SEED = 2**32 - 1  # of numpy's
MANY_STEPS = 1_000_000
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "label_smoothing_factor": 0,
    "seed": 0,
}


def trainer_arguments(config: TrainConfig, where: str) -> TrainingArguments:
    """Make `TrainingArguments`. Raises `ConfigError` for an unknown key or an invalid value.

    `where` is the configuration file, for error texts.
    """
    # Trainer accepts bfloat16 on a CPU only with `use_cpu`.
    device = {"use_cpu": True} if not torch.accelerator.is_available() else {}
    values = {**device, **config.trainer_arguments}
    arguments = make_foreign(TrainingArguments, where, "train", values, check=_build_what_trainer_builds)
    _check_numbers(arguments, where)
    arguments.dataloader_pin_memory = arguments.dataloader_pin_memory and torch.cuda.is_available()
    # Trainer would log the mean of the earlier losses in place of a loss that is not finite.
    arguments.logging_nan_inf_filter = False
    return arguments


def _build_what_trainer_builds(arguments: TrainingArguments) -> None:
    """Build the data loader, optimizer and scheduler for a dummy model, so that invalid values raise now."""
    arguments.get_process_log_level()
    get_reporting_integration_callbacks(arguments.report_to)
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=max(0, arguments.dataloader_num_workers),
        prefetch_factor=arguments.dataloader_prefetch_factor,
        persistent_workers=arguments.dataloader_persistent_workers,
    )
    optimizer: torch.optim.Optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1e-3)
    if arguments.optim_target_modules is None:  # else the optimizer needs the model's module names
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, nn.Linear(1, 1))  # type: ignore[arg-type]
        if arguments.learning_rate >= 0:  # a negative one is refused below, with its key
            made = cls([nn.Parameter(torch.zeros(1))], **options)
            optimizer = made if isinstance(made, torch.optim.Optimizer) else optimizer
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=0,
        num_training_steps=MANY_STEPS,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )


def _check_numbers(arguments: TrainingArguments, where: str) -> None:
    def refuse(key: str, needed: str) -> None:
        value: Any = getattr(arguments, key)
        raise ConfigError(f"{where}: train.{key} = {value!r}: {needed} is needed")

    for key, least in AT_LEAST.items():
        if not least <= getattr(arguments, key) < math.inf:
            refuse(key, f"a number of {least} or more")
    if arguments.seed > LARGEST_SEED:
        refuse("seed", f"a number of at most {LARGEST_SEED}")
    if arguments.label_smoothing_factor > 1:
        refuse("label_smoothing_factor", "a number of at most 1")
    if arguments.save_total_limit is not None and arguments.save_total_limit < 1:
        refuse("save_total_limit", "a number of 1 or more")
    if not 0 < arguments.num_train_epochs < math.inf:
        refuse("num_train_epochs", "a number over 0")
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        refuse("max_steps", "a number of 1 or more, or -1 for as many as train.num_train_epochs gives,")
