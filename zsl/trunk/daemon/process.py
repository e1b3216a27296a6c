"""Run the daemon: bind the port, load the trunk, serve, and drain on a signal."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

import zsl
from zsl.errors import StartupError
from zsl.files.free_memory import free_bytes
from zsl.text.byte_size import to_mib
from zsl.text.plural import counted
from zsl.text.printable import printable
from zsl.transport.curve_keys import refuses_unknown_keys
from zsl.transport.listening import raise_file_limit
from zsl.trunk.access.options import Access
from zsl.trunk.daemon.load import TrunkPlan, plan_trunk
from zsl.trunk.daemon.loading_port import Loading
from zsl.trunk.daemon.log import LogFormat
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.daemon.sighup import Hangup
from zsl.trunk.daemon.standard_streams import check_output, drain_output
from zsl.trunk.failpoints import Failpoint
from zsl.trunk.settings import ServerSettings, TrunkInfo, TrunkTraits
from zsl.trunk.stash_memory import default_stash_memory
from zsl.wire.messages import Cut, Quantization, Reveal

logger = logging.getLogger(__name__)

READY_SECONDS = 2.0  # wait for the ready line to be read
LAST_LINES_SECONDS = 1.0  # wait for the last log lines when ending at once


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """Parsed options of `zsl-trunkd`."""

    model: str
    cut: Cut | None
    host: str
    port: int
    dtype: torch.dtype
    quantize: Quantization | None
    device: str
    threads: int | None
    forward_only: bool
    reveals: tuple[Reveal, ...]
    settings: ServerSettings  # those that save graphs get their `stash_memory_bytes` by the memory of the device
    max_batch_tokens: int | None
    merge_below_tokens: int | None
    deterministic: bool
    access: Access | None
    failpoint: Failpoint
    log_format: LogFormat


def run_daemon(options: DaemonOptions) -> None:
    """Load and serve a trunk until SIGTERM or SIGINT. Call `zsl.trunk.malloc.keep_freed_memory` first.

    Raises `ModelError` or `StartupError` if it cannot start, `RunFailed` if it fails while serving.
    """
    raise_file_limit()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    hangup = Hangup(None if options.access is None else options.access.allowlist.reload, _end_while_loading)
    if hangup.is_obeyed:
        signal.signal(signal.SIGHUP, hangup)
    with Loading(options.host, options.port, options.access) as loading:  # a port in use fails before loading
        logger.info("%s: clients are told to wait while %s is loaded", loading.endpoint, options.model)
        plan = plan_trunk(
            options.model,
            options.cut,
            options.dtype,
            options.device,
            forward_only=options.forward_only,
            quantize=options.quantize,
            reveals=options.reveals,
        )
        asyncio.run(_serve(plan, options, loading, hangup))


async def _serve(plan: TrunkPlan, options: DaemonOptions, loading: Loading, hangup: Hangup) -> None:
    access, settings = options.access, options.settings
    if settings.saves_graphs:
        settings = replace(settings, stash_memory_bytes=default_stash_memory(_available_bytes(plan.device)))
    server = TrunkServer(
        plan.info,
        settings,
        access=access,
        failpoint=options.failpoint,
    )
    _obey_signals(server, loading, hangup, reloads=access is not None)
    try:
        logger.info("loading layers %s of %s", plan.cut, options.model)
        # In a thread that ends: if its OpenMP threads existed beside those of the compute thread, libgomp would see
        # more threads than processors, and let them sleep at every barrier instead of spin.
        with ThreadPoolExecutor(1, "zsl-load") as thread:
            compute = await asyncio.get_running_loop().run_in_executor(
                thread,
                lambda: plan.load(
                    max_batch_tokens=options.max_batch_tokens,
                    merge_below_tokens=options.merge_below_tokens,
                    deterministic=options.deterministic,
                    pass_memory_bytes=settings.stash_memory_bytes,
                ),
            )
        _tell_bound(plan.info, settings, compute.traits)
        port = loading.port
        loading.close()
        endpoint = server.bind(options.host, port)
        if access is not None and not await refuses_unknown_keys(endpoint, access.keys.public):
            raise StartupError("the self-test failed: an unknown key was accepted; not serving")
    except BaseException:
        server.close()
        raise
    if options.deterministic and not compute.traits.deterministic:
        logger.warning(
            "--deterministic: the self-test failed on this device and dtype; clients that require it are refused"
        )
    sys.stdout.write(
        _ready(endpoint, plan, compute.traits, options) + "\n"
    )  # in one write: a reader may close the pipe after it
    sys.stdout.flush()
    await _check_ready_was_written()
    await server.run(compute)
    logger.info("stopped")


def _available_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() if device.type == "cpu" else None


def _tell_bound(info: TrunkInfo, settings: ServerSettings, traits: TrunkTraits) -> None:
    """Log if `--stash-memory` lowers the largest request, or is less than it needs."""
    granted = settings.granted_tokens(info, traits.pass_memory)
    if granted == settings.max_request_tokens:
        return
    logger.info(
        "requests of up to %s are granted, which take up to %d MiB while they run; %s take --stash-memory %dMiB",
        counted(granted, "token"),
        to_mib(traits.pass_memory.nbytes_of_rows(granted, info.max_row_tokens)),
        f"{settings.max_request_tokens:,}",
        to_mib(traits.pass_memory.nbytes_of_rows(settings.max_request_tokens, info.max_row_tokens)),
    )


def _obey_signals(server: TrunkServer, loading: Loading, hangup: Hangup, *, reloads: bool) -> None:
    """Install handlers: SIGTERM and SIGINT drain; a second one, or one while loading, exits. SIGHUP: see `Hangup`."""
    loop = asyncio.get_running_loop()
    signals: list[signal.Signals] = []

    def on_signal(received: signal.Signals) -> None:
        signals.append(received)
        if loading.is_open:
            _end_while_loading(received)
        elif len(signals) == 1:
            logger.info("%s: taking no new work, letting open steps end (again: end at once)", received.name)
            server.drain()
        else:
            _leave(received)  # the compute thread may be within a pass; clients repeat its requests

    hangup.reload = server.reload_tenants if reloads else None
    hangup.end = on_signal
    if hangup.is_obeyed:
        loop.add_signal_handler(signal.SIGHUP, hangup)
    for wanted in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(wanted, on_signal, wanted)


def _end_while_loading(received: signal.Signals) -> None:
    logger.info("%s: ending before the model is loaded", received.name)
    _leave(received)  # the loading thread cannot be stopped


def _leave(received: signal.Signals) -> None:
    drain_output(LAST_LINES_SECONDS)
    os._exit(128 + received)


async def _check_ready_was_written() -> None:
    """Raise `RunFailed` if the ready line is lost, since a script may wait for it. An unread pipe is no error."""
    if not await asyncio.to_thread(drain_output, READY_SECONDS):
        logger.warning("standard output or error is not read; serving, and dropping lines over the buffer")
    check_output()


def _ready(endpoint: str, plan: TrunkPlan, traits: TrunkTraits, options: DaemonOptions) -> str:
    """Format the ready message for stdout: text lines, or one JSON object. Scripts wait for its first line."""
    facts: dict[str, Any] = {
        "endpoint": endpoint,
        "model": options.model,
        "cut": str(plan.cut),
        "parameters": traits.parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "quantization": plan.info.quantization,
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "forward_only": plan.info.forward_only,
        "reveals": list(plan.info.reveals),
        "packs": traits.packs,
        "max_batch_tokens": traits.batch_limits.max_batch_tokens,
        "merge_below_tokens": traits.batch_limits.merge_below_tokens if traits.merges else 0,
        "deterministic": traits.deterministic,
        "encrypted": options.access is not None,
        "version": zsl.__version__,
    }
    if options.log_format == "json":
        return json.dumps({"event": "ready", **facts})
    what = "forward only" if plan.info.forward_only else "forward and backward"
    merging = "no merging"
    if facts["merge_below_tokens"]:
        merging = (
            f"requests of up to {counted(facts['merge_below_tokens'], 'token')} share passes of "
            f"{facts['max_batch_tokens']:,}" + (", deterministic" if traits.deterministic else "")
        )
    secured = "encrypted" if options.access is not None else "not encrypted, open to whoever reaches it"
    parameters = counted(traits.parameters, "parameter")
    dtype = facts["dtype"] if plan.info.quantization is None else f"{plan.info.quantization}, {facts['dtype']}"
    if plan.info.reveals:
        what += f", reveals {' and '.join(plan.info.reveals).replace('_', ' ')}"
    lines = [
        f"zsl-trunkd {zsl.__version__} ready on {endpoint}",
        f"{options.model}, layers {plan.cut}, {parameters}, {dtype} on {plan.device}",
        f"{what}, {merging}",
        secured,
    ]
    return "\n  ".join(map(printable, lines))
