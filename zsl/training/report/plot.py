"""Draw the losses of a run to `loss.png`. Imports matplotlib only on use."""

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
SMOOTHED_FROM = 30  # steps; fewer are readable without an average
SMOOTHED_PARTS = 20  # averaging windows in a run
POINTS = 2000  # more than the width in pixels
LOGARITHMIC_FROM = 50.0  # ratio of the largest to the smallest loss
LARGEST_EXPONENT = 700.0  # of e, below the overflow of a double
COLOR, VALIDATION_COLOR, QUIET_COLOR = "#1f5fa8", "#c8501e", "#606060"

Numbers = npt.NDArray[np.float64]


def write_loss_plot(
    file: Path, steps: Sequence[tuple[int, float]], validations: Sequence[tuple[int, float]], *, title: str
) -> None:
    """Draw (step, loss) pairs to a PNG: the steps, their moving average if there are many, and the validations.

    Losses that are not finite leave gaps. Raises `RunFailed` if it cannot be drawn or written; `file` is then
    unchanged.
    """
    try:
        picture = _draw(_finite(steps), _finite(validations), title)
        write_file(file, picture)
    except Exception as error:  # a broken matplotlib raises any type, and must not fail the run
        raise RunFailed(f"the loss plot could not be written to {file}: {reason(error)}") from error


def _finite(pairs: Sequence[tuple[int, float]]) -> Numbers:
    """Return a float64 array `[pairs, 2]`, with NaN for a loss that is not finite."""
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    array[~np.isfinite(array)] = math.nan
    return array


def _draw(steps: Numbers, validations: Numbers, title: str) -> bytes:
    """Return the plot as PNG data."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # the user's style may need missing fonts or LaTeX
        warnings.simplefilter("ignore")  # about letters in the title that the font lacks
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
    """Return the mean of the `window` values around each, without NaNs; NaN if all are NaN."""
    known = ~np.isnan(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, losses, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    begins = np.maximum(np.arange(len(losses)) - window // 2, 0)
    ends = np.minimum(np.arange(len(losses)) + (window + 1) // 2, len(losses))
    with np.errstate(invalid="ignore"):
        average: Numbers = (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])
    return average


def _add_perplexity(axes: Axes) -> None:
    """Add a perplexity axis at the right, with the loss axis's ticks: round perplexities would crowd at the top."""
    right = axes.secondary_yaxis("right")
    right.yaxis.set_major_locator(axes.yaxis.get_major_locator())
    right.yaxis.set_major_formatter(lambda loss, _: _three_digits(math.exp(min(loss, LARGEST_EXPONENT))))
    right.set_ylabel("perplexity", color=QUIET_COLOR)
    right.tick_params(length=0, colors=QUIET_COLOR)
    right.spines["right"].set_visible(False)


def _three_digits(number: float) -> str:
    """Format a number with three digits: `18.3`, `1,480`, `2.2e+07`."""
    if number < 100:
        return f"{number:.3g}"
    return f"{number:,.0f}" if number < 1e6 else f"{number:.1e}"
