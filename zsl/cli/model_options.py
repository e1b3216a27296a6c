"""Options that commands share: the model, its trunk, adapters, and the directory of what is written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zsl.cli.beside_imports import beside_imports
from zsl.cli.errors import tell
from zsl.errors import ConfigError
from zsl.models.dtypes import DTYPES

if TYPE_CHECKING:
    from zsl.models.reference import ModelReference
    from zsl.serving.open_model import OpenModel
    from zsl.training.directory.trained import Trained

    Opener = Callable[[ModelReference], AbstractContextManager[OpenModel]]

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
    """Add the options of the model and of its trunk, which `opener` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def find_model(model: str | None, adapters: Sequence[Path]) -> tuple[ModelReference, Trained | None]:
    """Resolve the model named, or else that of the adapters; return it, and the adapters. Raises `ZslError`.

    Shows on a terminal that it is being loaded, which may take minutes.
    """
    from zsl.cli.model_of_adapters import model_of
    from zsl.models.reference import resolve
    from zsl.training.directory.trained import find_trained

    if not adapters:
        if model is None:
            raise ConfigError("name a model with --model, or an adapter with --adapter")
        _tell_of_loading(model)
        return resolve(model), None
    _tell_of_loading(model or ", ".join(map(str, adapters)))
    trained = find_trained(adapters)
    return model_of(trained, model), trained


def _tell_of_loading(name: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        tell(f"{click.get_current_context().command_path}: loading {name}")


@contextmanager
def opener(
    model: str | None,
    *,
    server: str | None,
    server_key: str | None,
    client_key: str | None,
    cut: str | None,
    dtype: str | None,
    debug: bool,
) -> Iterator[Opener]:
    """Yield the function that opens a model through the trunk that the options name; their own begins to load now."""
    from zsl.training.config.config import TrunkTable

    table = TrunkTable(endpoint=server, server_key=server_key, client_key=client_key, cut=cut)
    dtype = dtype or "float32"
    with beside_imports(table, model, dtype, debug=debug) as embedded:

        def opened(reference: ModelReference) -> AbstractContextManager[OpenModel]:
            from zsl.serving.open_model import open_model

            return open_model(reference, table, dtype=dtype, embedded=embedded)

        yield opened
