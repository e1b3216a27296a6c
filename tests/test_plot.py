"""`loss.png` is there at the end of any run, and a run is not lost over it."""

from __future__ import annotations

import builtins
import logging
import math
import random
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from zsl.errors import RunFailed
from zsl.training.report.plot import COLOR, VALIDATION_COLOR, write_loss_plot

Pairs = list[tuple[int, float]]
TITLE = "random:gpt2, cut 2:10, exact"


def falling(steps: int) -> Pairs:
    chance = random.Random(0)
    return [(step, 3 + math.exp(-4 * step / steps) + chance.gauss(0, 0.05)) for step in range(1, steps + 1)]


def drawn(directory: Path, steps: Pairs, validations: Pairs, title: str = TITLE) -> Any:
    """The picture `[height, width, 4]`, of numbers from 0 to 1."""
    file = directory / "loss.png"
    write_loss_plot(file, steps, validations, title=title)
    assert [path.name for path in directory.iterdir()] == ["loss.png"]
    return matplotlib.image.imread(file)


def pixels_of(color: str, picture: Any) -> int:
    wanted = matplotlib.colors.to_rgb(color)
    return int((np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.02).sum())


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("steps", "validations"),
    [
        ([(1, 5.4)], []),
        ([(1, 5.4)], [(1, 5.5)]),
        (falling(10), [(0, 4.1), (10, 3.1)]),
        (falling(200), [(200, 3.05)]),
        (falling(100_000), [(step, 3.2) for step in range(0, 100_001, 1000)]),
        ([(1, 3.0), (2, NAN), (3, INF), (4, 2.9)], [(2, NAN), (4, 3.1)]),
        ([(step, NAN if step % 2 else 3.0) for step in range(1, 100)], []),
        ([(1, 3.0), (2, 1e30)], [(2, 1e300)]),  # what a rate that is too high does
        ([(1, 0.0), (2, 0.0)], [(2, 0.0)]),
        ([(1, -3.0), (2, 400.0)], []),  # some losses are negative
        (falling(3), [(0, 705.0)]),
    ],
)
def test_training_and_validation_are_seen_whatever_the_losses_are(
    steps: Pairs, validations: Pairs, tmp_path: Path
) -> None:
    picture = drawn(tmp_path, steps, validations)
    assert pixels_of(COLOR, picture) > 10
    assert (pixels_of(VALIDATION_COLOR, picture) > 10) == bool(validations)


@pytest.mark.parametrize("steps", [[], [(1, NAN)], [(step, INF) for step in range(50)]])
def test_without_any_number_there_is_still_a_picture(steps: Pairs, tmp_path: Path) -> None:
    assert pixels_of(COLOR, drawn(tmp_path, steps, [(1, NAN)])) == 0


@pytest.mark.parametrize("title", ["costs $_{ and $", "模型 cut 2:4", "", "long " * 100])
def test_any_name_can_stand_over_it_and_nothing_is_said_of_fonts(
    title: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        drawn(tmp_path, falling(3), [], title)
    assert caplog.text == "" and capfd.readouterr() == ("", "")


def test_the_users_own_settings_of_matplotlib_neither_break_it_nor_change(tmp_path: Path) -> None:
    plain = drawn(tmp_path, falling(3), [])
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black", "lines.linewidth": 9}):
        assert np.array_equal(drawn(tmp_path, falling(3), []), plain)
        assert matplotlib.rcParams["text.usetex"] is True and matplotlib.rcParams["lines.linewidth"] == 9


def test_what_stood_there_stays_when_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = drawn(tmp_path, falling(3), [])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zsl.files.durable.sync", full)
    with pytest.raises(RunFailed, match=r"loss\.png: No space left on device$"):
        write_loss_plot(tmp_path / "loss.png", falling(9), [], title=TITLE)
    assert np.array_equal(matplotlib.image.imread(tmp_path / "loss.png"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_matplotlib_that_is_not_there_or_broken_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("freetype is broken\nin several lines")

    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", breaks)
        with pytest.raises(RunFailed, match=r"loss\.png: freetype is broken$"):
            write_loss_plot(tmp_path / "loss.png", falling(3), [], title=TITLE)
    real_import = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunFailed, match="'matplotlib'"):
        write_loss_plot(tmp_path / "loss.png", falling(3), [], title=TITLE)
    assert list(tmp_path.iterdir()) == []
