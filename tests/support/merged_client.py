"""A client that sends every form of batch beside others, and compares each gradient with the whole local model's."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import zsl
from zsl.client.trunk_client import TrunkClient

from .forms import FORMS, TOLERANCE, gradients_of, largest_difference
from .models import LAYERS, local_model, with_lora


@dataclass(frozen=True)
class Way:
    """The forms of a client's batches, and the layers and rank of its adapter. The trunk has layers 2 and 3."""

    forms: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int


# Each client has forms of its own; together they are all that there are.
CLIENTS = (
    Way(("left_padded", "left_padded_with_positions", "one_token"), tuple(range(LAYERS)), 2),
    Way(("right_padded", "ragged", "with_holes"), tuple(range(LAYERS)), 16),
    Way(("packed_by_trl", "shifted", "plain"), (0, 1, 4, 5), 4),
    Way(("restarting_in_rows", "restarting_alike", "left_padded"), (0, 3, 5), 7),
)
BATCHES = 24  # of a client, again and again
WAIT_SECONDS = 120.0


@dataclass
class Report:
    """`wrong`: form and difference of each step whose gradients are not the local ones. `shared`: how many requests
    of each form shared a pass."""

    steps: int = 0
    largest: float = 0.0
    wrong: list[tuple[str, float]] = field(default_factory=list)
    shared: Counter[str] = field(default_factory=Counter)


class Client:
    """Made in one thread: what loads models draws of one source of random numbers. `run` may be another's."""

    def __init__(self, path: str, endpoint: str, way: Way) -> None:
        seeds_of_forms = zip(range(BATCHES), itertools.cycle(way.forms), strict=False)
        self._batches = [(form, FORMS[form](seed)) for seed, form in seeds_of_forms]
        local = with_lora(local_model(path), layers=way.layers, rank=way.rank)
        self._expected = [gradients_of(local, batch) for _, batch in self._batches]
        self._trunk = zsl.RemoteTrunk(endpoint)
        self._model = with_lora(zsl.load_client(path, self._trunk), layers=way.layers, rank=way.rank)

    @property
    def packs(self) -> bool:
        """True if the daemon's trunk packs sequences of any lengths."""
        return self._trunk.client.welcome.packs

    def run(self, steps: int, barrier: threading.Barrier | None = None) -> Report:
        """Take so many steps; with a barrier each begins beside the others'."""
        report, merged = Report(), note_merged(self._trunk.client)
        for step in range(steps):
            form, batch = self._batches[step % BATCHES]
            if barrier is not None:
                barrier.wait(WAIT_SECONDS)  # broken, it ends the others too
            difference = largest_difference(gradients_of(self._model, batch), self._expected[step % BATCHES])
            report.steps += 1
            report.largest = max(report.largest, difference)
            if not difference <= TOLERANCE:  # nor NaN
                report.wrong.append((form, difference))
            report.shared[form] += sum(requests > 1 for requests in merged)
            merged.clear()
        return report

    def close(self) -> None:
        self._trunk.close()


def run_in_process(arguments: tuple[str, str, Way, int]) -> Report:
    """A client from its beginning to its end: path, endpoint, way and steps."""
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    *how, steps = arguments
    client = Client(*how)
    try:
        return client.run(steps)
    finally:
        client.close()


def note_merged(client: TrunkClient) -> list[int]:
    """Record the number of requests in the pass of each following answer."""
    merged: list[int] = []
    forward, backward = client.forward, client.backward

    def noted_forward(*arguments: Any, **options: Any) -> Any:
        step = forward(*arguments, **options)
        merged.append(step.answer.merged)
        return step

    def noted_backward(*arguments: Any, **options: Any) -> Any:
        answer = backward(*arguments, **options)
        merged.append(answer.merged)
        return answer

    client.forward, client.backward = noted_forward, noted_backward  # type: ignore[method-assign]
    return merged
