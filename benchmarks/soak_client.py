"""A client of the soak: trains a tiny model again and again, and writes down every gradient that it uses.

Its process is forked from a server that has imported torch already, so it starts at once, and may be killed at any
moment: each round has a file of its own (tests/support/history.py), of which at most the last line is torn.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import zsl
from support import batches
from support.history import History, digest
from support.models import with_lora
from zsl.errors import ZslError

STEPS = 20  # of one round; the next begins where the first began
LEARNING_RATE = 1e-2
REST_AFTER_ERROR_SECONDS = 0.5
# Between steps. Without it, 50 clients of so small a model take all of the machine, and a daemon that was killed needs
# minutes to import torch.
REST_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """What one client does. `trajectory`: which data; clients with equal ones must see equal gradients."""

    name: str
    trajectory: int
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
    model = with_lora(zsl.load_client(task.model, trunk))
    start = {name: parameter.detach().clone() for name, parameter in _trainable(model)}
    number = 0
    while task.rounds is None or number < task.rounds:
        name = f"{task.name}-{os.getpid()}-{number}"
        history = History(task.directory / f"{name}.history")
        with (task.directory / f"{name}.steps").open("w") as steps:
            for line in _round(task, model, start, history, trunk):
                steps.write(line + "\n")
                steps.flush()
        history.close()
        number += 1
    trunk.close()


def _round(
    task: Task, model: PeftModel, start: dict[str, torch.Tensor], history: History, trunk: zsl.RemoteTrunk
) -> Iterator[str]:
    """One way along the trajectory, from its beginning; ended by the first error. A line about each step."""
    client = f"trajectory {task.trajectory}"
    trainable = _trainable(model)
    with torch.no_grad():
        for name, parameter in trainable:
            parameter.copy_(start[name])
    optimizer = torch.optim.Adam([parameter for _, parameter in trainable], lr=LEARNING_RATE)
    for step in range(STEPS):
        began, replays = time.monotonic(), trunk.client.replays
        history.begin(client, step)
        optimizer.zero_grad()
        try:
            model(**batches.plain(seed=1000 * task.trajectory + step)).loss.backward()
        except ZslError as error:
            history.error(client, step, error)
            yield json.dumps({"error": type(error).__name__, "seconds": time.monotonic() - began})
            time.sleep(REST_AFTER_ERROR_SECONDS)
            return
        history.gradient(client, step, digest(_bytes(parameter.grad) for _, parameter in trainable))
        optimizer.step()
        yield json.dumps({"seconds": time.monotonic() - began, "replays": trunk.client.replays - replays})
        time.sleep(REST_SECONDS)


def _trainable(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _bytes(gradient: torch.Tensor | None) -> bytes | memoryview:
    return b"" if gradient is None else gradient.numpy().data
