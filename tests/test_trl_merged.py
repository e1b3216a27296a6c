"""TRL's trainers for preferences and rewards, alone and several at once: each trains as on its local model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from support.daemon import Daemon
from support.forks import forks
from support.trl_trainer import Task, train

STEPS, TRAINERS = 12, 4
TOLERANCE = 1e-5  # of losses and norms; relative where they are over 1
WAIT_SECONDS = 140.0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_four_trainers_at_once_have_the_local_losses_and_gradient_norms(
    kind: Literal["grpo", "dpo"], serve: Callable[..., Daemon], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    locals_ = [Task(kind, str(checkpoints("llama")), None, tmp_path, STEPS, seed) for seed in range(TRAINERS)]
    splits = [replace(task, endpoint=serve("llama").endpoint) for task in locals_]
    with forks().Pool(TRAINERS) as processes:
        expected = processes.map_async(train, locals_, chunksize=1).get(WAIT_SECONDS)
        found = processes.map_async(train, splits, chunksize=1).get(WAIT_SECONDS)
    assert len({tuple(record.steps) for record in expected}) == TRAINERS, "each has data of its own"
    wrong = [
        (trainer, step, ours, theirs)
        for trainer, (split, whole) in enumerate(zip(found, expected, strict=True))
        for step, (ours, theirs) in enumerate(zip(split.steps, whole.steps, strict=True))
        if not all(abs(a - b) <= TOLERANCE * max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
    ]
    assert [len(record.steps) for record in found] == [STEPS] * TRAINERS
    assert wrong == []


@pytest.mark.long
def test_twenty_steps_of_grpo_alone_have_the_local_losses_gradient_norms_and_texts(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit for bit, by a daemon that computes with as many threads."""
    local = Task("grpo", str(checkpoints("llama")), None, tmp_path, 20, seed=0)
    split = replace(local, endpoint=serve("llama", "--threads", "1").endpoint)
    with forks().Pool(1) as process:
        expected, found = (process.apply_async(train, [task]).get(WAIT_SECONDS) for task in (local, split))
    assert found == expected
    assert len(found.steps) == 20 < len(set(found.completions))
