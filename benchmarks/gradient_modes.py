"""Compare the validation loss of the modes `exact`, `straight-through` and `none` on the same data.

Each mode is a whole run of `zsl-train` with an embedded trunk: same model, rows, seed and steps. The validation
perplexity before the first step and after each epoch makes the table and the plot.

    bin/bench gradient_modes                SmolLM2-135M-Instruct on python-docs, 3 epochs over 512 rows of 128 tokens
"""

from __future__ import annotations

from pathlib import Path

import click
from perplexity_curves import add_curve, options_of_runs, plot, train
from report import Report

MODES = ("exact", "straight-through", "none")


@click.command()
@options_of_runs
@click.option("--learning-rate", default=2e-4, show_default=True, help="Learning rate of each run.")
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
        curves[mode] = train(config, work / mode, settings)
        add_curve(report, curves[mode], mode=mode)
    report.note(f"{config.name}: {samples} training rows, {epochs} epochs, learning rate {learning_rate:g}, one seed")
    report.publish()
    if figure is not None:
        plot(curves, figure)


if __name__ == "__main__":
    main()
