"""Measure the time of each part of a training step, and the bytes sent to and from the trunk.

Timestamps are taken at the begin and end of the model's forward, and of each exchange with the trunk. The time between
two timestamps is counted for one part, so the parts add up to the step. GPU kernels run asynchronously: the copy to the
CPU synchronizes before an exchange, and `torch.cuda.synchronize` at the end of a micro-batch and of a step.
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
    """Measures the training steps of a model that is split around `trunk`.

    Call `fetch` around loading a step's rows, `micro_batch` around a forward and backward, and `end_step` after the
    optimizer. Time between two steps (validation, checkpoints) is not counted. `parts=False` measures whole steps only,
    for overlapping micro-batches.
    """

    def __init__(
        self, model: nn.Module, trunk: RemoteTrunk, *, parts: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._trunk = trunk
        self._parts = parts
        self._clock = clock
        self._traffic: Traffic | None = None  # at the begin of the current step
        self._reset()
        if parts:
            model.register_forward_pre_hook(lambda *_: self._mark("bottom"))
            model.register_forward_hook(lambda *_: self._mark("top"))  # the head's backward follows
            trunk.on_crossing = self._crossed

    @contextmanager
    def fetch(self) -> Iterator[None]:
        """Measure the loading of a step's rows, with which the step begins."""
        self._begin()
        self._mark("data")
        try:
            yield
        finally:
            self._mark("other")

    def drop(self) -> None:
        """Discard the current step."""
        self._reset()

    @contextmanager
    def micro_batch(self, tokens: int) -> Iterator[None]:
        """Measure the forward and backward of a micro-batch of `tokens` tokens."""
        self._begin()
        self._tokens += tokens
        try:
            yield
            _wait_for_gpu()
        finally:
            self._mark("other")

    def end_step(self) -> StepMeasure:
        """End the current step, and return its measurements."""
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
        """Count the time from now on for `place`."""
        if self._traffic is None:
            return  # outside a step, as in a validation
        now = self._clock()
        self._seconds[self._place] += now - self._since
        self._place, self._since = place, now


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
