"""`zsl-trunkd`: serve the middle layers of a model."""

from __future__ import annotations

import re

import click

import zsl
from zsl.cli.errors import one_line_errors

DTYPES = ("float32", "bfloat16", "float16")
MEMORY_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class MemorySize(click.ParamType[int]):
    """A number of bytes, with a unit if one is written."""

    name = "SIZE"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(value).strip())
        if match is None or match[2].lower() not in MEMORY_UNITS:
            self.fail(f"{value!r} is not a size; write for example 4GiB or 500MB", param, ctx)
        return int(float(match[1]) * MEMORY_UNITS[match[2].lower()])


@click.command(context_settings={"auto_envvar_prefix": "ZSL_TRUNKD", "help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    default="random:gpt2",
    show_default=True,
    show_envvar=True,
    help="Hub id, checkpoint directory, .gguf file, package:<name>, or random:<model_type>.",
)
@click.option(
    "--cut",
    metavar="START:STOP",
    show_envvar=True,
    help="The layers to serve, START to STOP-1.  [default: all but two at each end; 2:10 for GPT-2]",
)
@click.option("--host", default="127.0.0.1", show_default=True, show_envvar=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=5555,
    show_default=True,
    show_envvar=True,
    help="Port to listen on; 0 picks a free one and prints it.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, show_envvar=True)
@click.option("--device", default="cpu", show_default=True, show_envvar=True, help="cpu, cuda, cuda:1, …")
@click.option("--threads", type=click.IntRange(1), show_envvar=True, help="CPU threads.  [default: torch's own choice]")
@click.option(
    "--forward-only", is_flag=True, show_envvar=True, help="Refuse backward: clients learn behind the trunk only."
)
@click.option(
    "--stash-memory",
    type=MemorySize(),
    default="4GiB",
    show_default=True,
    show_envvar=True,
    help="Memory for what pending backwards need; over it they compute their forward again.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(1),
    show_envvar=True,
    help="Tokens of a pass that requests share.  [default: measured at start]",
)
@click.option(
    "--merge-below-tokens",
    type=click.IntRange(0),
    show_envvar=True,
    help="Requests of at most so many tokens share passes; 0: none do.  [default: measured at start]",
)
@click.option(
    "--deterministic",
    type=click.Choice(["packed"]),
    show_envvar=True,
    help="Give every shared pass one length, so that an answer is the same bit for bit whoever shares it.",
)
@click.option(
    "--insecure", is_flag=True, show_envvar=True, help="Allow an address outside loopback: no encryption, no keys."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, show_envvar=True)
@click.option("--debug", is_flag=True, show_envvar=True, help="Log more, and show tracebacks.")
@click.version_option(zsl.__version__, prog_name="zsl-trunkd")
def trunkd(
    model: str,
    cut: str | None,
    host: str,
    port: int,
    dtype: str,
    device: str,
    threads: int | None,
    forward_only: bool,
    stash_memory: int,
    max_batch_tokens: int | None,
    merge_below_tokens: int | None,
    deterministic: str | None,
    insecure: bool,
    log_format: str,
    debug: bool,
) -> None:
    """Serve the frozen middle layers of a model to clients that train around them.

    Prints one line when it is ready. SIGTERM or Ctrl-C lets open steps end; a second one ends at once.
    """
    with one_line_errors("zsl-trunkd", debug=debug):
        from zsl.split.cut import parse_cut
        from zsl.trunk.logs import set_up_logging

        parsed_cut = parse_cut(cut) if cut else None
        set_up_logging(log_format, debug=debug)  # type: ignore[arg-type]

        import torch
        from transformers.utils.logging import disable_progress_bar

        from zsl.trunk.daemon import DaemonOptions, run_daemon

        disable_progress_bar()
        options = DaemonOptions(
            model=model,
            cut=parsed_cut,
            host=host,
            port=port,
            dtype=getattr(torch, dtype),
            device=device,
            threads=threads,
            forward_only=forward_only,
            stash_memory_bytes=stash_memory,
            max_batch_tokens=max_batch_tokens,
            merge_below_tokens=merge_below_tokens,
            deterministic=deterministic == "packed",
            insecure=insecure,
            log_format=log_format,  # type: ignore[arg-type]
        )
        run_daemon(options)
