"""Client process of `throughput.py` and `memory.py`: run the turns read from stdin (see `turns.py`).

python benchmarks/throughput_client.py --seed 0 --threads 1
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

# All three, and nothing of zsl: until its first turn this is the bare process that memory is compared with.
import peft  # noqa: F401
import torch
import transformers
from turns import StepSeconds, Turn, Window


def take_turn(turn: Turn, seed: int) -> Window | None:
    """Build, warm up, wait for the others, and measure. None if there is no one to measure for any more."""
    from client_steps import client_step  # imports zsl

    merged: list[int] = []
    with client_step(turn, seed, merged) as step:
        say({"step_seconds": step().total})
        line = sys.stdin.readline()
        if not line:
            return None
        merged.clear()
        taken, steps = measure(step, json.loads(line)["seconds"])
        device_bytes = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0
    return Window(
        steps=steps,
        forward_seconds=[seconds.forward for seconds in taken],
        backward_seconds=[seconds.backward for seconds in taken],
        step_seconds=[seconds.total for seconds in taken],
        merged=merged,
        device_bytes=device_bytes,
    )


def measure(step: Callable[[], StepSeconds], seconds: float) -> tuple[list[StepSeconds], float]:
    """The steps that were begun in so many seconds, and how many they were, with the last one in part."""
    taken = []
    ended = time.perf_counter()
    end = ended + seconds
    while ended < end:
        last_began = ended
        taken.append(step())
        ended = time.perf_counter()
    return taken, len(taken) - 1 + (end - last_began) / (ended - last_began)


def give_back_memory() -> None:
    """Free memory, so that the next turn is measured without it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def say(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


@click.command()
@click.option("--seed", default=0, help="Seed of the data.")
@click.option("--threads", default=1, help="CPU threads of torch.")
def main(seed: int, threads: int) -> None:
    """Take turns until stdin ends."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # PEFT calls a property that transformers has renamed.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    say({})
    while line := sys.stdin.readline():
        window = take_turn(Turn(**json.loads(line)), seed)
        if window is None:
            return
        give_back_memory()
        say(asdict(window))


if __name__ == "__main__":
    main()
