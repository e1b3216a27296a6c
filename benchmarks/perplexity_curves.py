"""Runs of `zsl-train` to compare: their options, their validation perplexity after each epoch, and a plot of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from matplotlib.figure import Figure
from report import Report, out_option

COMMAND = [sys.executable, "-c", "from zsl.cli.train import train; train(prog_name='zsl-train')"]
FIGURE_INCHES = (7, 4.2)
DOTS_PER_INCH = 150
EXAMPLE = Path(__file__).parent.parent / "examples/smollm2.toml"
OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--config",
        default=EXAMPLE,
        type=click.Path(path_type=Path),
        show_default=True,
        help="Configuration of the runs.",
    ),
    click.option("--samples", default=512, show_default=True, help="Rows to train on."),
    click.option("--epochs", default=3, show_default=True, help="Epochs of each run."),
    click.option("--work", required=True, type=click.Path(path_type=Path), help="Directory for the runs."),
    click.option("--figure", type=click.Path(path_type=Path), help="PNG file for the plot."),
    out_option,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

Curve = Sequence[Mapping[str, float]]  # validation lines of a run: epoch, step, eval_loss, eval_perplexity


def options_of_runs(command: Decorated) -> Decorated:
    """Add the options of runs that are compared."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def train(config: Path, directory: Path, settings: Mapping[str, Any]) -> Curve:
    """Run `zsl-train` with a configuration and settings, and return the validation lines of `metrics.jsonl`."""
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    subprocess.run([*COMMAND, str(config), "--save-dir", str(directory), *options], check=True)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def add_curve(report: Report, curve: Curve, **names: str) -> None:
    """Add a line to the report for each validation."""
    for line in curve:
        report.add(
            **names,
            epoch=round(line["epoch"], 2),
            step=line["step"],
            validation_loss=round(line["eval_loss"], 4),
            perplexity=round(line["eval_perplexity"], 3),
        )


def plot(curves: Mapping[str, Curve], file: Path) -> None:
    """Plot validation perplexity over epochs, a line per run, on a logarithmic axis."""
    figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
    axes = figure.subplots()
    for (name, lines), style in zip(curves.items(), ("o-", "s-", "x--") * len(curves), strict=False):
        axes.plot([line["epoch"] for line in lines], [line["eval_perplexity"] for line in lines], style, label=name)
    axes.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DOTS_PER_INCH)
