"""`loss.png`: the loss of a run's steps, and of its validations. Loads matplotlib only to draw."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from zsl.errors import RunFailed
from zsl.files.durable import reason, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_INCHES = (8, 4.5)
DOTS_PER_INCH = 130
SMOOTHED_FROM = 30  # steps; fewer can be seen through
SMOOTHED_PARTS = 20  # of the run, each as long as an average goes
POINTS = 2000  # more than there are pixels
LOGARITHMIC_FROM = 50.0  # times as large as the smallest is the largest loss
LARGEST_EXPONENT = 700.0  # of e, in a double
COLOR, VALIDATION_COLOR, QUIET_COLOR = "#1f5fa8", "#c8501e", "#606060"

Numbers = npt.NDArray[np.float64]


def write_loss_plot(
    file: Path, steps: Sequence[tuple[int, float]], validations: Sequence[tuple[int, float]], *, title: str
) -> None:
    """Draw (step, loss) pairs to a PNG: each step's, their average where there are many, and the validations'.

    Losses that are not finite leave gaps. Raises `RunFailed` if it cannot be drawn or written, and then what `file`
    held is still there.
    """
    try:
        picture = _draw(_finite(steps), _finite(validations), title)
        write_file(file, picture)
    except Exception as error:  # also what a broken matplotlib raises: the run is worth more than its picture
        raise RunFailed(f"the loss plot could not be written to {file}: {reason(error)}") from error


def _finite(pairs: Sequence[tuple[int, float]]) -> Numbers:
    """As an array `[pairs, 2]`, with NaN for a loss that is not finite."""
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    array[~np.isfinite(array)] = math.nan
    return array


def _draw(steps: Numbers, validations: Numbers, title: str) -> bytes:
    """The PNG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a style of the user's may need what is not there
        warnings.simplefilter("ignore")  # of a letter of the title that the font lacks
        figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
        axes = figure.subplots()
        _draw_training(axes, steps)
        if len(validations):
            axes.plot(*validations.T, "o-", color=VALIDATION_COLOR, markersize=4, linewidth=1.2, label="validation")
        axes.set(xlabel="step", ylabel="loss")
        axes.set_title(title, loc="left", fontsize="medium", parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        losses = np.concatenate([steps[:, 1], validations[:, 1]])
        losses = losses[~np.isnan(losses)]
        if not len(losses):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no loss is a finite number", transform=axes.transAxes, ha="center", color=QUIET_COLOR)
        elif losses.min() > 0 and losses.max() / losses.min() >= LOGARITHMIC_FROM:
            axes.set_yscale("log")
            axes.legend(frameon=False)
        else:
            _add_perplexity(axes)
            axes.legend(frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    return picture.getvalue()


def _draw_training(axes: Axes, steps: Numbers) -> None:
    stride = math.ceil(len(steps) / POINTS) or 1
    numbers, losses = steps[::stride].T
    if len(steps) < SMOOTHED_FROM:
        axes.plot(numbers, losses, "o-", color=COLOR, markersize=3, linewidth=1.4, label="training")
        return
    window = max(5, len(steps) // SMOOTHED_PARTS)
    average = _moving_average(steps[:, 1], window)[::stride]
    of_steps = "each step" if stride == 1 else f"one step of {stride:,}"
    axes.plot(numbers, losses, color=COLOR, linewidth=0.8, alpha=0.3, label=f"training, {of_steps}")
    axes.plot(numbers, average, color=COLOR, linewidth=1.8, label=f"training, average of {window:,} steps")


def _moving_average(losses: Numbers, window: int) -> Numbers:
    """The mean of the `window` values around each, of those that are there; NaN where none is."""
    known = ~np.isnan(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, losses, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    begins = np.maximum(np.arange(len(losses)) - window // 2, 0)
    ends = np.minimum(np.arange(len(losses)) + (window + 1) // 2, len(losses))
    with np.errstate(invalid="ignore"):
        average: Numbers = (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])
    return average


def _add_perplexity(axes: Axes) -> None:
    """A scale at the right, beside that of the loss: e to its numbers. (Round perplexities would crowd at the top.)"""
    right = axes.secondary_yaxis("right")
    right.yaxis.set_major_locator(axes.yaxis.get_major_locator())
    right.yaxis.set_major_formatter(lambda loss, _: _three_digits(math.exp(min(loss, LARGEST_EXPONENT))))
    right.set_ylabel("perplexity", color=QUIET_COLOR)
    right.tick_params(length=0, colors=QUIET_COLOR)
    right.spines["right"].set_visible(False)


def _three_digits(number: float) -> str:
    """`18.3`, `1,480`, `2.2e+07`."""
    if number < 100:
        return f"{number:.3g}"
    return f"{number:,.0f}" if number < 1e6 else f"{number:.1e}"
