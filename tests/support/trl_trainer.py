"""Trainings by TRL's own GRPOTrainer and DPOTrainer, as they are: the record of one, on a split or a local model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import zsl

from .models import local_model, with_lora
from .tokenizer import tiny_tokenizer, words

SAMPLES = 64


@dataclass(frozen=True)
class Task:
    """One training. Without an `endpoint` the model is the whole local one."""

    kind: Literal["grpo", "dpo"]
    model: str
    endpoint: str | None
    directory: Path
    steps: int
    seed: int


class Record(NamedTuple):
    """Loss and gradient norm of each step, and the texts that were sampled."""

    steps: list[tuple[float, float]]
    completions: list[str]


def train(task: Task) -> Record:
    """Train, and return the record. In a process of its own: it changes what warns and what is printed."""
    torch.set_num_threads(1)
    disable_progress_bar()
    disable_progress_bars()
    set_verbosity_error()
    warnings.simplefilter("ignore")
    trunk = zsl.RemoteTrunk(task.endpoint) if task.endpoint else None
    model = with_lora(local_model(task.model) if trunk is None else zsl.load_client(task.model, trunk))
    completions: list[str] = []
    try:
        trainer = _grpo(task, model, completions) if task.kind == "grpo" else _dpo(task, model)
        trainer.train()
    finally:
        if trunk is not None:
            trunk.close()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Record([(entry["loss"], entry["grad_norm"]) for entry in logged], completions)


def _grpo(task: Task, model: Any, noted: list[str]) -> GRPOTrainer:
    def reward(completions: list[str], **_: Any) -> list[float]:
        """Rarely equal for two texts: without an advantage the gradient is rounding alone, which Adam enlarges."""
        noted.extend(completions)
        return [sum(completion.encode()) % 997 / 997 for completion in completions]

    arguments = GRPOConfig(
        **_common(task),
        num_generations=2,
        max_completion_length=6,
        beta=0.1,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [_text(task, n, 2 + 5 * n % 9) for n in range(SAMPLES)]}),
        processing_class=tiny_tokenizer(),
    )


def _dpo(task: Task, model: Any) -> DPOTrainer:
    data = {
        "prompt": [_text(task, n, 2 + 5 * n % 9) for n in range(SAMPLES)],
        "chosen": [" " + _text(task, 3 * n, 1 + n % 7) for n in range(SAMPLES)],
        "rejected": [" " + _text(task, 7 * n, 2 + n % 5) for n in range(SAMPLES)],
    }
    return DPOTrainer(
        model=model,
        args=DPOConfig(**_common(task)),
        train_dataset=Dataset.from_dict(data),
        processing_class=tiny_tokenizer(),
    )


def _common(task: Task) -> dict[str, Any]:
    where = "local" if task.endpoint is None else "split"
    return {
        "output_dir": str(task.directory / f"{task.kind}-{where}-{task.seed}"),
        "per_device_train_batch_size": 4,
        "max_steps": task.steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": task.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def _text(task: Task, number: int, length: int) -> str:
    """Text of `length` words, with other words for each task."""
    return words(*range(31 * task.seed + number, 31 * task.seed + number + length))
