"""Where the time of a training step goes: data, bottom, wire, trunk, top. And how many bytes crossed for it.

Marks are taken where the model's forward begins and ends and where a batch crosses to the trunk and is back. Between
two marks the time belongs to one part, so that the parts of a step add up to it. On a GPU calls return before their
work is done: it is waited for before a crossing begins (by the copy to the CPU), and at the end of a micro-batch and of
a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from zsl.client.remote import RemoteTrunk
from zsl.client.trunk_function import CrossingEvent
from zsl.link.traffic import Traffic
from zsl.training.report.step_measure import StepMeasure

Place = Literal["data", "bottom", "crossing", "top", "other"]
PLACES: tuple[Place, ...] = get_args(Place)


class StepTimes:
    """Measures the training steps of a model whose hole `trunk` fills.

    `fetch` goes around getting a step's rows, `micro_batch` around a micro-batch's forward and backward, `end_step`
    behind the optimizer. What lies between two steps (validation, checkpoints) is not counted. `parts=False`:
    micro-batches are in flight together.
    """

    def __init__(
        self, model: nn.Module, trunk: RemoteTrunk, *, parts: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._trunk = trunk
        self._parts = parts
        self._clock = clock
        self._traffic: Traffic | None = None  # when the step began that is under way
        self._reset()
        if parts:
            model.register_forward_pre_hook(lambda *_: self._mark("bottom"))
            model.register_forward_hook(lambda *_: self._mark("top"))  # what follows is the head's backward
            trunk.on_crossing = self._crossed

    @contextmanager
    def fetch(self) -> Iterator[None]:
        """Around getting the rows of a step, which begins with that."""
        self._begin()
        self._mark("data")
        try:
            yield
        finally:
            self._mark("other")

    def drop(self) -> None:
        """There were no rows for a step."""
        self._reset()

    @contextmanager
    def micro_batch(self, tokens: int) -> Iterator[None]:
        """Around forward and backward of so many tokens."""
        self._begin()
        self._tokens += tokens
        try:
            yield
            _wait_for_gpu()
        finally:
            self._mark("other")

    def end_step(self) -> StepMeasure:
        """What the step took that ends now."""
        _wait_for_gpu()
        self._mark("other")
        traffic = self._trunk.client.traffic - (self._traffic or self._trunk.client.traffic)
        measure = StepMeasure(
            steps=1,
            tokens=self._tokens,
            seconds=self._since - self._began,
            data_seconds=self._seconds["data"],
            bottom_seconds=self._seconds["bottom"],
            crossing_seconds=self._seconds["crossing"],
            top_seconds=self._seconds["top"],
            other_seconds=self._seconds["other"],
            traffic=traffic,
            parts_known=self._parts,
        )
        self._reset()
        return measure

    def _begin(self) -> None:
        if self._traffic is None:
            self._traffic = self._trunk.client.traffic
            self._began = self._since = self._clock()

    def _reset(self) -> None:
        self._traffic = None
        self._tokens = 0
        self._place: Place = "other"
        self._began = self._since = 0.0
        self._seconds: dict[Place, float] = dict.fromkeys(PLACES, 0.0)

    def _crossed(self, event: CrossingEvent) -> None:
        direction, moment = event
        if moment == "begins":
            self._mark("crossing")
        else:
            self._mark("top" if direction == "forward" else "bottom")

    def _mark(self, place: Place) -> None:
        """From now on the time is that of `place`."""
        if self._traffic is None:
            return  # a validation, between two steps
        now = self._clock()
        self._seconds[self._place] += now - self._since
        self._place, self._since = place, now


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
