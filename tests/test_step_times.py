"""The parts of a step add up to it, each moment belongs to the part that it was spent in, and the bytes are its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zsl
from support import batches
from support.embedded import served
from support.models import with_lora
from zsl.client.trunk_function import CrossingEvent
from zsl.link.traffic import Traffic
from zsl.training.trainer.step_times import StepMeasure, StepTimes


class Clock:
    """Whole seconds, so that sums are exact."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Acted:
    """A model and its trunk whose every move takes the seconds that a test says, by the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.on_crossing: Callable[[CrossingEvent], None] = lambda event: None
        self.client = SimpleNamespace(traffic=Traffic())
        self.model = nn.Identity()
        self.model.forward = self._forward  # type: ignore[assignment]

    def training_step(self, seconds: list[int], *, crosses_back: bool = True) -> None:
        before, bottom, there, top, head, back, bottom_back, _ = map(float, seconds)
        self._clock.now += before
        self.model((bottom, there, top))
        self._clock.now += head
        if crosses_back:
            self._cross("backward", back)
            self._clock.now += bottom_back

    def _forward(self, seconds: tuple[float, float, float]) -> None:
        bottom, there, top = seconds
        self._clock.now += bottom
        self._cross("forward", there)
        self._clock.now += top

    def _cross(self, direction: Any, seconds: float) -> None:
        self.on_crossing((direction, "begins"))
        self._clock.now += seconds
        earlier = self.client.traffic
        self.client.traffic = Traffic(
            answers=earlier.answers + 1,
            replays=earlier.replays + 1,
            bytes_up=earlier.bytes_up + 300,
            bytes_down=earlier.bytes_down + 200,
            queue_seconds=earlier.queue_seconds + seconds / 4,
            compute_seconds=earlier.compute_seconds + seconds / 2,
        )
        self.on_crossing((direction, "ended"))


def acted(clock: Clock, *, parts: bool = True) -> tuple[Acted, StepTimes]:
    stage = Acted(clock)
    return stage, StepTimes(stage.model, stage, parts=parts, clock=clock)  # type: ignore[arg-type]


SECONDS = st.lists(st.integers(0, 1000), min_size=8, max_size=8)


@given(
    steps=st.lists(st.lists(SECONDS, min_size=1, max_size=4), min_size=1, max_size=3),
    fetching=st.integers(0, 99),
    between=st.integers(0, 99),
)
def test_each_second_of_a_step_is_counted_once_in_its_part(
    steps: list[list[list[int]]], fetching: int, between: int
) -> None:
    clock = Clock()
    stage, times = acted(clock)
    for micro_batches in steps:
        with times.fetch():
            clock.now += fetching
        for seconds in micro_batches:
            with times.micro_batch(tokens=7):
                stage.training_step(seconds)
            clock.now += seconds[7]
        measure = times.end_step()
        before, bottom, there, top, head, back, bottom_back, after = map(sum, zip(*micro_batches, strict=True))
        crossing = there + back
        assert measure.part_seconds == {
            "data": fetching,
            "bottom": bottom + bottom_back,
            "wire": crossing / 4,
            "trunk": crossing * 3 / 4,
            "top": top + head,
            "other": before + after,
        }
        assert sum(measure.part_seconds.values()) == measure.seconds == fetching + sum(map(sum, micro_batches))
        assert measure.traffic.queue_seconds == crossing / 4
        assert measure.tokens == 7 * len(micro_batches)
        crossings = 2 * len(micro_batches)
        assert (measure.traffic.bytes_up, measure.traffic.bytes_down) == (300 * crossings, 200 * crossings)
        assert (measure.steps, measure.traffic.replays) == (1, crossings)
        # A validation, a checkpoint, an epoch's end where no rows are left.
        clock.now += between
        stage.training_step([between] * 8)
        with times.fetch():
            clock.now += between
        times.drop()


def test_without_a_way_back_the_backward_is_the_tops() -> None:
    """As in the mode `none`, and where nothing in the bottom learns."""
    clock = Clock()
    stage, times = acted(clock)
    with times.micro_batch(tokens=1):
        stage.training_step([1, 2, 4, 8, 16, 0, 0, 0], crosses_back=False)
    parts = {"data": 0, "bottom": 2, "wire": 1, "trunk": 3, "top": 24, "other": 1}
    assert times.end_step().part_seconds == parts


def test_with_micro_batches_in_flight_together_only_what_is_true_is_said() -> None:
    clock = Clock()
    stage, times = acted(clock, parts=False)
    with times.micro_batch(tokens=5):
        stage.training_step([1, 2, 4, 8, 16, 32, 64, 0])
    measure = times.end_step()
    assert measure.part_seconds == {}
    assert (measure.seconds, measure.traffic.bytes_up, measure.traffic.queue_seconds, measure.tokens) == (
        127,
        600,
        9,
        5,
    )
    assert measure.trunk_seconds == 27
    assert not any(name.startswith("share/") for name in measure.as_log())
    assert not (measure + StepMeasure(steps=1)).parts_known


def test_a_daemon_that_says_more_than_was_waited_for_takes_no_other_parts_time() -> None:
    said = Traffic(queue_seconds=3, compute_seconds=3)
    measure = StepMeasure(steps=1, seconds=10, crossing_seconds=4, top_seconds=6, traffic=said)
    assert measure.part_seconds == {"data": 0, "bottom": 0, "wire": 0, "trunk": 4, "top": 6, "other": 0}


def test_a_sum_of_steps_is_told_by_the_step() -> None:
    crossed = Traffic(bytes_up=10, compute_seconds=0.5), Traffic(bytes_up=30, compute_seconds=1.5, replays=1)
    one = StepMeasure(steps=1, tokens=100, seconds=2.0, top_seconds=2.0, traffic=crossed[0])
    two = StepMeasure(steps=1, tokens=200, seconds=4.0, bottom_seconds=4.0, traffic=crossed[1])
    both = StepMeasure() + one + two
    log = both.as_log()
    assert both.tokens_per_second == log["tokens_per_second"] == 50
    assert (log["trunk/bytes_up"], log["trunk/compute_seconds"], log["trunk/replays"]) == (20, 1, 1)
    assert log["share/top"] == pytest.approx(1 / 3) and log["share/bottom"] == pytest.approx(2 / 3)
    assert StepMeasure().as_log()["tokens_per_second"] == 0
    assert "replays" not in one.as_line() and two.as_line()["replays"] == 1


@pytest.mark.parametrize("mode", ["exact", "straight-through", "none"])
@pytest.mark.filterwarnings("ignore:mode is 'none':UserWarning")
def test_a_real_step_adds_up_and_its_bytes_are_those_of_the_connection(
    mode: Any, checkpoints: Callable[..., Path]
) -> None:
    path = str(checkpoints("llama"))
    batch = batches.padded("right")
    measures, validations = [], []
    with served(path) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint, mode=mode)
        model = with_lora(zsl.load_client(path, trunk))
        seconds = count()
        times = StepTimes(model, trunk, parts=True, clock=lambda: float(next(seconds)))
        began = trunk.client.traffic
        for _ in range(2):
            for _ in range(3):
                with times.micro_batch(tokens=30):
                    model(**batch).loss.backward()
            measures.append(times.end_step())
            before, tick = trunk.client.traffic, next(seconds)
            with torch.no_grad():
                model(**batch)
            assert next(seconds) == tick + 1, "a validation takes no mark"
            validations.append(trunk.client.traffic - before)
        total = trunk.client.traffic - began
        trunk.close()
    for measure in measures:
        assert sum(measure.part_seconds.values()) == pytest.approx(measure.seconds)
        # The clock ticks once a mark: crossings there, and back where a gradient is asked for.
        assert measure.crossing_seconds == (6 if mode == "exact" else 3)
        assert measure.bottom_seconds == (3 if mode == "none" else 6)
        assert measure.traffic.compute_seconds > 0
        # 30 real tokens of 32 numbers of 4 bytes, and what describes them.
        tensors = 30 * 32 * 4 * (6 if mode == "exact" else 3)
        assert tensors < measure.traffic.bytes_up < tensors * 1.5
        assert tensors < measure.traffic.bytes_down < tensors * 1.5
    crossed = [*(one.traffic for one in measures), *validations]
    assert sum(one.bytes_up for one in crossed) == total.bytes_up
    assert sum(one.bytes_down for one in crossed) == total.bytes_down
    assert [one.answers for one in validations] == [1, 1]


def test_training_through_a_watched_trunk_changes_no_bit(checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints("llama"))
    gradients = []
    for watched in (False, True):
        with served(path) as endpoint:
            trunk = zsl.RemoteTrunk(endpoint)
            model = with_lora(zsl.load_client(path, trunk))
            times = StepTimes(model, trunk, parts=True) if watched else None
            if times is None:
                model(**batches.plain()).loss.backward()
            else:
                with times.micro_batch(tokens=32):
                    model(**batches.plain()).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
            trunk.close()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
