"""Compare the validation loss of the modes `exact`, `straight-through` and `none` on the same data.

Each mode is a whole run of `zsl-train` with an embedded trunk: same model, rows, seed and steps. The validation
perplexity before the first step and after each epoch makes the table and the plot.

    bin/bench gradient_modes                SmolLM2-135M-Instruct on python-docs, 3 epochs over 512 rows of 128 tokens
"""

from __future__ import annotations

from pathlib import Path

import click
from perplexity_curves import add_curve, plot, train
from report import Report, out_option

ROOT = Path(__file__).parent.parent
MODES = ("exact", "straight-through", "none")


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
        curves[mode] = train(config, work / mode, settings)
        add_curve(report, curves[mode], mode=mode)
    report.note(f"{config.name}: {samples} training rows, {epochs} epochs, learning rate {learning_rate:g}, one seed")
    report.publish()
    if figure is not None:
        plot(curves, figure)


if __name__ == "__main__":
    main()
