"""Command `zsl-trunkd`: serve the middle layers of a model."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import click

import zsl
from zsl.cli.errors import Command, one_line_errors
from zsl.errors import ConfigError
from zsl.models.dtypes import DTYPES
from zsl.trunk.malloc import keep_freed_memory
from zsl.trunk.openmp import SPINS_WHERE_SHARED, limit_spinning, stop_spinning_if_shared

logger = logging.getLogger(__name__)


class MemorySize(click.ParamType[int]):
    """Option type: a number of bytes, with an optional unit."""

    name = "SIZE"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from zsl.text.byte_size import parse_size

        try:
            return parse_size(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command(
    cls=Command, context_settings={"auto_envvar_prefix": "ZSL_TRUNKD", "help_option_names": ["-h", "--help"]}
)
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
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    show_envvar=True,
    help="Dtype of the layers and of the computation.",
)
@click.option(
    "--quantize",
    type=click.Choice(["4bit", "8bit"]),
    show_envvar=True,
    help="The linear layers in 4 or 8 bits; needs bitsandbytes.",
)
@click.option("--device", default="cpu", show_default=True, show_envvar=True, help="cpu, cuda, cuda:1, …")
@click.option("--threads", type=click.IntRange(1), show_envvar=True, help="CPU threads.  [default: torch's own choice]")
@click.option(
    "--forward-only",
    is_flag=True,
    show_envvar=True,
    help="Refuse backward requests: clients can train only the layers behind the trunk.",
)
@click.option(
    "--reveal",
    default="",
    metavar="NAMES",
    show_envvar=True,
    help="Send clients that ask for them tensors from inside the trunk: hidden-states, router-logits, or both, "
    "separated by a comma.  [default: none]",
)
@click.option(
    "--stash-memory",
    type=MemorySize(),
    show_envvar=True,
    help="About the memory that the daemon may use for pending backwards and the running pass. Beyond it, backwards "
    "recompute their forward; it also bounds the largest request.  [default: 4GiB or half of the free memory; of "
    "that, graphs of more than one pass take no more than the weights]",
)
@click.option(
    "--adapter-memory",
    type=MemorySize(),
    default="1GiB",
    show_default=True,
    show_envvar=True,
    help="Memory for the adapters that clients have in the trunk's layers. One may take a quarter of it.",
)
@click.option(
    "--max-adapter-rank",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    show_envvar=True,
    help="Largest rank of an adapter in the trunk's layers.",
)
@click.option(
    "--no-adapters",
    is_flag=True,
    show_envvar=True,
    help="Refuse adapters in the trunk's layers: clients adapt their own.",
)
@click.option(
    "--cache-memory",
    type=MemorySize(),
    default="4GiB",
    show_default=True,
    show_envvar=True,
    help="Memory for the keys and values of the texts that clients generate; 0: none are kept, and generation is slow.",
)
@click.option(
    "--decode-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    show_envvar=True,
    help="Part of the device's time for the texts that clients generate, while training waits too; it gets the rest. "
    "If only one of them waits, it has the whole device.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(1),
    show_envvar=True,
    help="Most tokens of a pass that requests share.  [default: measured at start]",
)
@click.option(
    "--merge-below-tokens",
    type=click.IntRange(0),
    show_envvar=True,
    help="Requests of at most this many tokens share passes; 0: none do.  [default: measured at start]",
)
@click.option(
    "--deterministic",
    type=click.Choice(["packed"]),
    show_envvar=True,
    help="Give every shared pass one length, so that an answer is bit for bit the same, whichever requests share it.",
)
@click.option(
    "--keys",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    show_envvar=True,
    help="Encrypt, with the key pair DIR/server.key_secret that `zsl keygen server` made.",
)
@click.option(
    "--tenants",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    show_envvar=True,
    help="TOML file of the public keys of accepted clients. SIGHUP reads it again.",
)
@click.option(
    "--insecure", is_flag=True, show_envvar=True, help="Allow an address outside loopback: no encryption, no keys."
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    show_envvar=True,
    help="Log lines of text, or a JSON object per line.",
)
@click.option("--debug", is_flag=True, show_envvar=True, help="Log more, and show tracebacks.")
@click.version_option(zsl.__version__, prog_name="zsl-trunkd")
def trunkd(
    model: str,
    cut: str | None,
    host: str,
    port: int,
    dtype: str,
    quantize: str | None,
    device: str,
    threads: int | None,
    forward_only: bool,
    reveal: str,
    stash_memory: int | None,
    adapter_memory: int,
    max_adapter_rank: int,
    no_adapters: bool,
    cache_memory: int,
    decode_share: float,
    max_batch_tokens: int | None,
    merge_below_tokens: int | None,
    deterministic: str | None,
    keys: Path | None,
    tenants: Path | None,
    insecure: bool,
    log_format: str,
    debug: bool,
) -> None:
    """Serve the frozen middle layers of a model to clients that train around them.

    Logs when it is ready; with --log-format json in one line. SIGTERM or Ctrl-C waits for open steps; a second one
    exits at once.
    """
    from zsl.trunk.daemon.log import line_of_dropped
    from zsl.trunk.daemon.standard_streams import written_by_threads

    keep_freed_memory()  # before the first thread
    dropped = line_of_dropped(log_format)  # type: ignore[arg-type]
    with written_by_threads(dropped), one_line_errors("zsl-trunkd", debug=debug):
        from zsl.split.cut import parse_cut
        from zsl.trunk.access.options import check_address, read_access
        from zsl.trunk.daemon.log import set_up_logging
        from zsl.trunk.failpoints import failpoint_from
        from zsl.trunk.settings import ServerSettings, parse_reveals

        set_up_logging(log_format, debug=debug)  # type: ignore[arg-type]
        parsed_cut = parse_cut(cut) if cut else None
        reveals = parse_reveals(reveal)
        access = read_access(keys, tenants)
        host = host.removeprefix("[").removesuffix("]")  # as an IPv6 address is written before a port
        check_address(host, encrypted=access is not None, insecure=insecure)
        failpoint = failpoint_from(os.environ)
        if stop_spinning_if_shared(os.environ):
            logger.info(
                "other processes use these cores: OpenMP's threads do not spin (GOMP_SPINCOUNT=%s)", SPINS_WHERE_SHARED
            )
        limit_spinning(os.environ)

        import torch
        from transformers.utils.logging import disable_progress_bar

        from zsl.trunk.daemon.process import DaemonOptions, run_daemon

        disable_progress_bar()
        settings = ServerSettings(
            saves_graphs=stash_memory is None,
            adapter_memory_bytes=0 if no_adapters else adapter_memory,
            max_adapter_rank=max_adapter_rank,
            cache_memory_bytes=cache_memory,
            decode_share=decode_share,
        )
        if stash_memory is not None:
            settings = replace(settings, stash_memory_bytes=stash_memory)
        options = DaemonOptions(
            model=model,
            cut=parsed_cut,
            host=host,
            port=port,
            dtype=getattr(torch, dtype),
            quantize=quantize,  # type: ignore[arg-type]
            device=device,
            threads=threads,
            forward_only=forward_only,
            reveals=reveals,
            settings=settings,
            max_batch_tokens=max_batch_tokens,
            merge_below_tokens=merge_below_tokens,
            deterministic=deterministic == "packed",
            access=access,
            failpoint=failpoint,
            log_format=log_format,  # type: ignore[arg-type]
        )
        run_daemon(options)
