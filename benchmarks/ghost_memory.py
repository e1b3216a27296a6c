"""Measure the memory of one client with and without the modules of the trunk's layers, and with adapters on them.

    python benchmarks/ghost_memory.py                 SmolLM2-135M-Instruct, cut 2:28, 2 x 128 tokens

Each arrangement has a process of its own at the same daemon. `resident`: after loading; weights in a mapped file count
when they are first used. `peak`: the largest resident set in its steps. `adapters`: weights of the adapters on the
trunk's layers, their gradients and the two moments of AdamW.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
from budget import status_bytes
from memory_use import MIB
from options import cut_option, model_option, size_option
from report import Report, out_option
from servers import trunk_daemon
from sizes import Size

STEPS = 4
PER_WEIGHT = 4  # tensors: weight, gradient, and two moments
# By arrangement: `layers` of `load_client`, and those with adapters. The first has the whole model.
ARRANGEMENTS = {
    "whole model here, adapters on the client's layers": (None, "client"),
    "without the trunk's modules": ("client", "client"),
    "with them, no adapters there": ("all", "client"),
    "with them, and adapters there": ("all", "all"),
}


@dataclass(frozen=True)
class Measured:
    """Bytes of one client. `trunk`: weights of the trunk's layers in fp32, none of which a split client has."""

    resident: int
    peak: int
    adapters: int
    trunk: int


def measure(endpoint: str, model: str, cut_text: str, size: Size, layers: str | None, adapted: str) -> Measured:
    """Load and train. In a process of its own."""
    import torch
    import transformers
    from trainee import trainee

    import zsl
    from zsl.models.loading import load_whole
    from zsl.models.reference import resolve
    from zsl.split.cut import parse_cut
    from zsl.split.meta_model import meta_model
    from zsl.split.stack import find_stack

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    reference, cut = resolve(model), parse_cut(cut_text)
    stack = find_stack(meta_model(reference.config)).layers
    trunk_bytes = sum(one.numel() * 4 for index in range(cut.start, cut.stop) for one in stack[index].parameters())
    with ExitStack() as opened:
        if layers is None:
            loaded = load_whole(reference)
        else:
            trunk = opened.enter_context(zsl.RemoteTrunk(endpoint))
            loaded = zsl.load_client(reference, trunk, cut=cut, layers=layers)  # type: ignore[arg-type]
        inside = range(cut.start, cut.stop)
        trained = trainee(loaded, [n for n in range(len(stack)) if adapted == "all" or n not in inside])
        ids = torch.randint(reference.config.get_text_config().vocab_size, (size.rows, size.tokens))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pid = multiprocessing.current_process().pid
        assert pid is not None
        resident = status_bytes(pid, "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(STEPS):
            trained.step(ids)
        layers_of_adapters = find_stack(trained.model.get_base_model()).layers  # type: ignore[operator]
        weights = [
            one.numel() * one.element_size()
            for index in inside
            for one in layers_of_adapters[index].parameters()
            if one.requires_grad
        ]
        return Measured(resident, status_bytes(pid, "VmHWM"), PER_WEIGHT * sum(weights), trunk_bytes)


@click.command()
@model_option
@cut_option
@size_option("a batch")
@click.option("--threads", default=1, show_default=True, help="CPU threads of the daemon.")
@out_option
def main(model: str, cut: str, size: Size, threads: int, out: Path) -> None:
    """Measure each arrangement, print a table, write it."""
    what = f"Memory of a client, {model}, cut {cut}, fp32, {size.rows} x {size.tokens} tokens, LoRA of rank 8"
    report = Report("ghost_memory", what, out)
    spawn = multiprocessing.get_context("spawn")
    found = {}
    with trunk_daemon("--model", model, "--cut", cut, "--threads", str(threads)) as daemon:
        for name, how in ARRANGEMENTS.items():
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                found[name] = process.submit(measure, daemon["endpoint"], model, cut, size, *how).result()
    without = found["without the trunk's modules"]
    for name, one in found.items():
        report.add(
            arrangement=name,
            resident_mib=one.resident / MIB,
            peak_mib=one.peak / MIB,
            adapters_mib=one.adapters / MIB,
            resident_over_without_mib=(one.resident - without.resident) / MIB,
            peak_over_without_mib=(one.peak - without.peak) / MIB,
        )
    report.note(f"weights of the trunk's layers: {without.trunk / MIB:.0f} MiB")
    report.publish()


if __name__ == "__main__":
    main()
