"""The daemon's process: take the port, load, serve, and end well on a signal."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address

import torch

import zsl
from zsl.errors import StartupError
from zsl.trunk.assemble import TrunkPlan, plan_trunk
from zsl.trunk.logs import LogFormat
from zsl.trunk.memory import keep_freed_memory
from zsl.trunk.server import TrunkServer
from zsl.trunk.settings import ServerSettings, TrunkTraits
from zsl.wire.messages import Cut

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What `zsl-trunkd` was asked for."""

    model: str
    cut: Cut | None
    host: str
    port: int
    dtype: torch.dtype
    device: str
    threads: int | None
    forward_only: bool
    stash_memory_bytes: int
    max_batch_tokens: int | None
    merge_below_tokens: int | None
    deterministic: bool
    insecure: bool
    log_format: LogFormat


def run_daemon(options: DaemonOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ModelError` or `StartupError` if it cannot start."""
    if not options.insecure and not _is_loopback(options.host):
        raise StartupError(
            f"--host {options.host}: anyone who reaches this address could use the trunk and read what clients send; "
            "listen on 127.0.0.1, or add --insecure if the network is yours alone"
        )
    keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan = plan_trunk(options.model, options.cut, options.dtype, options.device, forward_only=options.forward_only)
    asyncio.run(_serve(plan, options))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(plan: TrunkPlan, options: DaemonOptions) -> None:
    server = TrunkServer(plan.info, ServerSettings(stash_memory_bytes=options.stash_memory_bytes))
    endpoint = server.bind(options.host, options.port)  # before the weights: a port in use shows at once
    _obey_signals(server)
    try:
        logger.info("loading layers %s of %s", plan.cut, options.model)
        # In a thread that ends: with its OpenMP threads still there beside those of the compute thread, libgomp would
        # see more threads than processors, and have them sleep at every barrier instead of spin.
        with ThreadPoolExecutor(1, "zsl-load") as loading:
            compute = await asyncio.get_running_loop().run_in_executor(
                loading,
                lambda: plan.load(
                    max_batch_tokens=options.max_batch_tokens,
                    merge_below_tokens=options.merge_below_tokens,
                    deterministic=options.deterministic,
                ),
            )
    except BaseException:
        server.close()
        raise
    if options.deterministic and not compute.traits.deterministic:
        logger.warning("--deterministic: the self-test failed on this device and dtype; who insists is refused")
    _say_ready(endpoint, plan, compute.traits, options)
    await server.run(compute)
    logger.info("stopped")


def _obey_signals(server: TrunkServer) -> None:
    """First signal: drain. Second: end at once."""
    loop = asyncio.get_running_loop()
    signals: list[signal.Signals] = []

    def on_signal(received: signal.Signals) -> None:
        signals.append(received)
        if len(signals) == 1:
            logger.info("%s: taking no new work, letting open steps end (again: end at once)", received.name)
            server.drain()
        else:
            os._exit(128 + received)  # the compute thread may be in the middle of a pass; nothing is lost by it

    for wanted in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(wanted, on_signal, wanted)


def _say_ready(endpoint: str, plan: TrunkPlan, traits: TrunkTraits, options: DaemonOptions) -> None:
    """One line on stdout, for people and for scripts that wait for it."""
    facts = {
        "endpoint": endpoint,
        "model": options.model,
        "cut": str(plan.cut),
        "parameters": traits.parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.device),
        "threads": torch.get_num_threads(),
        "forward_only": plan.info.forward_only,
        "packs": traits.packs,
        "max_batch_tokens": traits.batch_limits.max_batch_tokens,
        "merge_below_tokens": traits.batch_limits.merge_below_tokens if traits.merges else 0,
        "deterministic": traits.deterministic,
        "version": zsl.__version__,
    }
    if options.log_format == "json":
        print(json.dumps({"event": "ready", **facts}), flush=True)
        return
    what = "forward only" if plan.info.forward_only else "forward and backward"
    merging = "no merging"
    if facts["merge_below_tokens"]:
        merging = (
            f"requests of up to {facts['merge_below_tokens']} tokens share passes of {facts['max_batch_tokens']}"
            + (", deterministic" if traits.deterministic else "")
        )
    print(
        f"zsl-trunkd {zsl.__version__} ready on {endpoint}: {options.model}, layers {plan.cut}, "
        f"{traits.parameters:,} parameters, {facts['dtype']} on {plan.device}, {what}, {merging}",
        flush=True,
    )
