"""Client of the soak: train a tiny model repeatedly and record every gradient.

Its batches have every form that trainers send (tests/support/forms.py), as its seed has it, and beside each gradient it
writes down how far it is from the whole local model's.

Its process is forked from a server that has imported torch already, so it starts at once, and may be killed at any
moment: each round has a file of its own (tests/support/history.py), of which at most the last line is torn.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import zsl
from support.forms import FORMS, Batch, gradients_of, largest_difference
from support.history import History, digest
from support.merged_client import note_merged
from support.models import LAYERS, local_model, with_lora
from zsl.errors import ZslError

STEPS = 20  # of one round; the next begins where the first began
LEARNING_RATE = 1e-2
REST_AFTER_ERROR_SECONDS = 0.5
# Between steps. Without it, 50 clients of so small a model take all of the machine, and a daemon that was killed needs
# minutes to import torch.
REST_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """Settings of one client. `trajectory` selects the data; clients with equal ones must get equal gradients."""

    name: str
    trajectory: int
    seed: int
    model: str
    endpoint: str
    directory: Path
    request_timeout_seconds: float
    rounds: int | None = None  # None: until it is killed


def train_rounds(task: Task) -> None:
    """The process."""
    os.nice(19)
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    logging.disable(logging.WARNING)  # that it connects again is what this is about
    trunk = zsl.RemoteTrunk(
        task.endpoint, connect_timeout_seconds=120, request_timeout_seconds=task.request_timeout_seconds
    )
    # Every other trajectory has adapters on the trunk's layers too, of several ranks.
    adapted: dict[str, Any] = {"layers": range(LAYERS), "rank": 2 + task.trajectory} if task.trajectory % 2 else {}
    split = with_lora(zsl.load_client(task.model, trunk), **adapted)
    local = with_lora(local_model(task.model), **adapted)
    models = _Models(split, local, trunk.client, note_merged(trunk.client))
    start = {name: parameter.detach().clone() for name, parameter in _trainable(split)}
    number = 0
    while task.rounds is None or number < task.rounds:
        name = f"{task.name}-{os.getpid()}-{number}"
        history = History(task.directory / f"{name}.history")
        with (task.directory / f"{name}.steps").open("w") as steps:
            for line in _round(task, models, start, history):
                steps.write(line + "\n")
                steps.flush()
        history.close()
        number += 1
    trunk.close()


@dataclass(frozen=True)
class _Models:
    """`merged`: how many requests shared the pass of each answer to `client`."""

    split: PeftModel
    local: PeftModel
    client: zsl.TrunkClient
    merged: list[int]


def _round(task: Task, models: _Models, start: dict[str, torch.Tensor], history: History) -> Iterator[str]:
    """One way along the trajectory, from its beginning; ended by the first error. A line about each step."""
    client = f"trajectory {task.trajectory}"
    trainable = _trainable(models.split)
    _set(models.split, start)
    optimizer = torch.optim.Adam([parameter for _, parameter in trainable], lr=LEARNING_RATE)
    for step in range(STEPS):
        form, batch = _batch(task, step)
        models.merged.clear()
        began, replays = time.monotonic(), models.client.replays
        history.begin(client, step)
        try:
            gradients = gradients_of(models.split, batch)
        except ZslError as error:
            history.error(client, step, error)
            yield json.dumps({"error": type(error).__name__, "seconds": time.monotonic() - began})
            time.sleep(REST_AFTER_ERROR_SECONDS)
            return
        history.gradient(client, step, digest(_bytes(parameter.grad) for _, parameter in trainable))
        line: dict[str, object] = {
            "seconds": time.monotonic() - began,
            "replays": models.client.replays - replays,
            "shared": sum(requests > 1 for requests in models.merged),
        }
        _set(models.local, dict(trainable))
        line |= {"form": form, "difference": largest_difference(gradients, gradients_of(models.local, batch))}
        optimizer.step()
        yield json.dumps(line)
        time.sleep(REST_SECONDS)


def _batch(task: Task, step: int) -> tuple[str, Batch]:
    """The form of a step's batch, and the batch."""
    chance = random.Random(f"{task.seed} {task.trajectory} {step}")
    form = chance.choice(list(FORMS))
    return form, FORMS[form](chance.randrange(2**31))


@torch.no_grad()
def _set(model: PeftModel, values: dict[str, torch.Tensor]) -> None:
    for name, parameter in _trainable(model):
        parameter.copy_(values[name])


def _trainable(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _bytes(gradient: torch.Tensor | None) -> bytes | memoryview:
    return b"" if gradient is None else gradient.numpy().data
