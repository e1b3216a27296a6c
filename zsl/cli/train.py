"""`zsl-train`: fine-tune through a trunk, as a TOML file says."""

from __future__ import annotations

import io
import logging
import signal
import sys
import warnings
from pathlib import Path

import click

import zsl
from zsl.cli.errors import one_line_errors


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--server", metavar="HOST:PORT", help="Train through this daemon.  [default: trunk.endpoint, or an embedded trunk]"
)
@click.option(
    "--save-dir", metavar="DIR", help="Where adapters and metrics go.  [default: train.output_dir, or runs/NAME]"
)
@click.option(
    "--set", "settings", metavar="TABLE.KEY=VALUE", multiple=True, help="Set any key, as in --set train.max_steps=5."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(zsl.__version__, prog_name="zsl-train")
def train(config: Path, server: str | None, save_dir: str | None, settings: tuple[str, ...], debug: bool) -> None:
    """Fine-tune the first and last layers of a model through a trunk, as CONFIG (a TOML file) says.

    The data, the labels and the adapters stay in this process.
    """
    with one_line_errors("zsl-train", debug=debug):
        from zsl.training.config import read_config

        overrides = {
            "trunk": {"endpoint": server} if server else {},
            "train": {"output_dir": save_dir} if save_dir else {},
        }
        checked = read_config(config, settings=settings, overrides=overrides)

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # a log file shows each step when it is done
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was trained is saved
        logging.basicConfig(level=logging.WARNING, format="zsl-train: %(message)s")
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from zsl.training.run import train_from_config

        disable_progress_bar()
        if not debug:
            # What the libraries below have to say to each other is not for whoever trains.
            set_verbosity_error()
            warnings.simplefilter("ignore", FutureWarning)
        train_from_config(checked, config)
