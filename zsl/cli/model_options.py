"""Options that commands share: the model, its trunk, adapters, and the directory of what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zsl.errors import ConfigError
from zsl.models.dtypes import DTYPES

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from zsl.models.reference import ModelReference
    from zsl.serving.open_model import OpenModel
    from zsl.training.directory.trained import Trained

_OPTIONS = (
    click.option("--model", metavar="REF", help="The model, as zsl-train takes it.  [default: that of the adapter]"),
    click.option("--server", metavar="HOST:PORT", help="Its trunk's daemon.  [default: one of its own]"),
    click.option("--server-key", metavar="KEY", help="The daemon's .key file, or the key itself."),
    click.option("--client-key", metavar="FILE", help="Your own .key_secret file."),
    click.option("--cut", metavar="START:STOP", help="The trunk's layers, START to STOP-1.  [default: the daemon's]"),
    click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of this process's layers.  [default: float32]"),
)

adapter_option = click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Use the model with this adapter, or that of this run.  [default: none]",
)

adapters_argument = click.argument(
    "adapters", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_ADAPTER…"
)


def out_option(what: str) -> Callable[..., Any]:
    """Return the option of a new directory for what a command writes."""
    text = f"Directory for {what}. It must not exist, or be empty."
    return click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True, help=text)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the model and of its trunk, which `opened` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def find_model(model: str | None, adapters: Sequence[Path]) -> tuple[ModelReference, Trained | None]:
    """Resolve the model named, or else that of the adapters; return it, and the adapters. Raises `ZslError`."""
    from zsl.cli.model_of_adapters import model_of
    from zsl.models.reference import resolve
    from zsl.training.directory.trained import find_trained

    if not adapters:
        if model is None:
            raise ConfigError("name a model with --model, or an adapter with --adapter")
        return resolve(model), None
    trained = find_trained(adapters)
    return model_of(trained, model), trained


def opened(
    reference: ModelReference,
    *,
    server: str | None,
    server_key: str | None,
    client_key: str | None,
    cut: str | None,
    dtype: str | None,
) -> AbstractContextManager[OpenModel]:
    """Open the model through the trunk that the options name."""
    from zsl.serving.open_model import open_model
    from zsl.training.config.config import TrunkTable

    table = TrunkTable(endpoint=server, server_key=server_key, client_key=client_key, cut=cut)
    return open_model(reference, table, dtype=dtype or "float32")
