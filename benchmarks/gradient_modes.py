"""Compare the validation loss of the modes `exact`, `straight-through` and `none` on the same data.

Each mode is a whole run of `zsl-train` with an embedded trunk: same model, rows, seed and steps. The validation
perplexity before the first step and after each epoch makes the table and the plot.

    bin/bench gradient_modes                SmolLM2-135M-Instruct on python-docs, 3 epochs over 512 rows of 128 tokens
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
from matplotlib.figure import Figure
from report import Report, out_option

ROOT = Path(__file__).parent.parent
MODES = ("exact", "straight-through", "none")
COMMAND = [sys.executable, "-c", "from zsl.cli.train import train; train(prog_name='zsl-train')"]
FIGURE_INCHES = (7, 4.2)
DOTS_PER_INCH = 150


def validations(directory: Path) -> list[dict[str, float]]:
    """Return the validation lines of `metrics.jsonl`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def plot(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Plot validation perplexity over epochs, a line per mode, on a logarithmic axis."""
    figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
    axes = figure.subplots()
    for mode, lines in curves.items():
        axes.plot([line["epoch"] for line in lines], [line["eval_perplexity"] for line in lines], "o-", label=mode)
    axes.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DOTS_PER_INCH)


@click.command()
@click.option(
    "--config",
    default=ROOT / "examples/smollm2.toml",
    type=click.Path(path_type=Path),
    show_default=True,
    help="Configuration of the runs.",
)
@click.option("--samples", default=512, show_default=True, help="Rows to train on.")
@click.option("--epochs", default=3, show_default=True, help="Epochs of each run.")
@click.option("--learning-rate", default=2e-4, show_default=True, help="Learning rate of each run.")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Directory for the runs.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG file for the plot.")
@out_option
def main(
    config: Path, samples: int, epochs: int, learning_rate: float, work: Path, figure: Path | None, out: Path
) -> None:
    """Train with each mode, print a table, write it and a plot."""
    report = Report("gradient_modes", "Validation loss by gradient mode", out)
    curves = {}
    for mode in MODES:
        settings = {
            "trunk.mode": mode,
            "data.samples": samples,
            "data.validation": 0.1,
            "train.num_train_epochs": epochs,
            "train.learning_rate": learning_rate,
            "train.disable_tqdm": "true",
        }
        options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        subprocess.run([*COMMAND, str(config), "--save-dir", str(work / mode), *options], check=True)
        curves[mode] = validations(work / mode)
        for line in curves[mode]:
            report.add(
                mode=mode,
                epoch=round(line["epoch"], 2),
                step=line["step"],
                validation_loss=round(line["eval_loss"], 4),
                perplexity=round(line["eval_perplexity"], 3),
            )
    report.note(f"{config.name}: {samples} training rows, {epochs} epochs, learning rate {learning_rate:g}, one seed")
    report.publish()
    if figure is not None:
        plot(curves, figure)


if __name__ == "__main__":
    main()
