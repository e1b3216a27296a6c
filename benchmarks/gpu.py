"""Check and measure zsl on a machine with a CUDA device: exact paths, transfers, then many clients at once.

    python benchmarks/gpu.py             a Llama of 3 billion random weights in bfloat16, up to 32 client processes
    python benchmarks/gpu.py --small     a tiny one on the CPU, for seconds: a test of the benchmark itself

Nothing is downloaded. Three tables: each path of the trunk's computation against double precision, in three dtypes;
copies between host and device, pinned as the daemon's and pageable; and training steps of 1 to 32 clients, each a
process with its own bottom, top, LoRA and optimizer on the same device, through one daemon. Their steps a second are
over those of one process that trains the whole model for one client after the other (`over_sequential`), and over one
that trains all of them as rows of one batch (`over_ideal`), which no separate clients can have.

Exits with 1 if a path is out of its tolerance. To be run where nothing else uses the device. The batch of 32 clients'
rows is for a device of 80 GB; smaller ones take `--size 1x32`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from clients import Clients
from gpu_paths import TOLERANCES, path_rows, split_row, write_small_model
from memory_use import MIB, pss_bytes
from report import Report, median, out_option, percentile
from servers import trunk_daemon
from sizes import Size, parse_size
from transformers import AutoModelForCausalLM, LlamaConfig
from turns import Turn, Window

import zsl
from zsl.trunk.compute.attention import VARLEN_CAPABILITY
from zsl.trunk.compute.transfer import Transfer
from zsl.wire.tensors import float_wire_name

TRANSFER_MB = (1, 64)
TRANSFER_ROUNDS = 9
FIRST_TOKENS = 16


@dataclass(frozen=True)
class Scale:
    """Size of the measurements: the clients' model, and their numbers."""

    device: str
    dtype: torch.dtype
    config: LlamaConfig
    cut: str
    counts: tuple[int, ...]
    size: str
    seconds: float
    path_dtypes: tuple[torch.dtype, ...]


FULL = Scale(
    device="cuda",
    dtype=torch.bfloat16,
    config=LlamaConfig(
        vocab_size=32_000,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
    cut="2:26",
    counts=(1, 2, 4, 8, 32),
    size="2x128",
    seconds=3.0,
    path_dtypes=tuple(TOLERANCES),
)
SMALL = Scale(
    device="cpu",
    dtype=torch.float32,
    config=LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4),
    cut="2:4",
    counts=(1, 2),
    size="1x4",
    seconds=0.1,
    path_dtypes=(torch.float32, torch.bfloat16),
)


def check_paths(scale: Scale, report: Report) -> list[str]:
    """Add a row for each path and dtype; return the names of those out of their tolerance."""
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_small_model(Path(directory))
        for dtype in scale.path_dtypes:
            for row in chain(path_rows(model, dtype, scale.device), [split_row(model, dtype, scale.device)]):
                report.add(**row)
                if row["within"] != "yes":
                    failed.append(f"{row['path']} in {row['dtype']}")
                if row["path"] == "packed, graph" and has_varlen(scale.device, dtype) and not row["varlen_kernels"]:
                    failed.append(f"{row['path']} in {row['dtype']}, without the variable-length kernel")
    return failed


def has_varlen(device: str, dtype: torch.dtype) -> bool:
    """Return whether packed passes use the variable-length flash kernel here."""
    if device != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability() >= VARLEN_CAPABILITY


def measure_transfers(device: torch.device, report: Report) -> None:
    """Add a row for each size: copies as the daemon makes them, and plain ones from and to pageable memory."""
    transfer = Transfer(device)

    def gb_per_second(copy: Callable[[], object], nbytes: int) -> float:
        seconds = []
        for _ in range(TRANSFER_ROUNDS):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            copy()
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        return nbytes / statistics.median(seconds) / 1e9

    for megabytes in TRANSFER_MB:
        on_host = torch.randn(megabytes * 250_000)
        (on_device,) = transfer.to_device([on_host])
        (returned,) = transfer.to_host([on_device])
        if not torch.equal(returned, on_host) or not returned.is_pinned():
            raise RuntimeError("a tensor came back changed, or not in pinned memory")
        report.add(
            megabytes=megabytes,
            to_device_gb_s=gb_per_second(lambda: transfer.to_device([on_host]), on_host.nbytes),  # noqa: B023
            to_host_gb_s=gb_per_second(lambda: transfer.to_host([on_device]), on_host.nbytes),  # noqa: B023
            pageable_to_device_gb_s=gb_per_second(lambda: on_host.to(device), on_host.nbytes),  # noqa: B023
            pageable_to_host_gb_s=gb_per_second(on_device.cpu, on_host.nbytes),
        )


def write_model(scale: Scale, directory: Path) -> int:
    """Write a checkpoint with random weights; return the number of its parameters."""
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(scale.config, dtype=scale.dtype)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def seconds_to_first_gradient(endpoint: str, scale: Scale) -> float:
    """Return the seconds from connecting to the gradient at the trunk's input."""
    activations, gradients = torch.randn(2, 1, FIRST_TOKENS, scale.config.hidden_size).to(scale.dtype)
    began = time.perf_counter()
    with zsl.TrunkClient(endpoint, dtype=float_wire_name(scale.dtype)) as trunk:
        trunk.backward(trunk.forward(activations, keep=True), gradients)
        return time.perf_counter() - began


def turn_of(scale: Scale, model: Path, size: Size, *, endpoint: str | None = None, clients: int = 1) -> Turn:
    """Describe a training step of a split client, or of a whole model with the rows of so many clients."""
    return Turn(
        kind="whole",
        through="local" if endpoint is None else "zsl",
        endpoint=endpoint,
        model=str(model),
        cut=scale.cut,
        rows=size.rows * clients,
        tokens=size.tokens,
        dtype=str(scale.dtype).removeprefix("torch."),
        device=scale.device,
    )


def local_steps_per_second(scale: Scale, model: Path, size: Size, threads: int) -> dict[int, float]:
    """Measure one process that trains the whole model for so many clients in one batch: the sum of their steps."""
    found = {}
    with Clients(threads=threads) as local:
        local.grow_to(1)
        for clients in sorted({1, *scale.counts}):
            local.prepare(turn_of(scale, model, size, clients=clients))
            (window,) = local.measure(scale.seconds)
            found[clients] = clients * window.steps / scale.seconds
    return found


def client_rows(
    scale: Scale, model: Path, size: Size, endpoint: str, local: dict[int, float], threads: int
) -> Sequence[dict[str, Any]]:
    """Measure so many clients at once through the daemon; return a row for each number."""
    rows = []
    with Clients(threads=threads) as clients:
        for number in scale.counts:
            clients.grow_to(number)
            clients.prepare(turn_of(scale, model, size, endpoint=endpoint))
            host_bytes = sum(map(pss_bytes, clients.pids)) / number
            windows = clients.measure(scale.seconds)
            rows.append(summary(number, windows, scale.seconds, local, host_bytes))
    return rows


def summary(
    number: int, windows: Sequence[Window], seconds: float, local: dict[int, float], host_bytes: float
) -> dict[str, Any]:
    """Return the numbers of so many clients that trained at once."""
    steps_per_second = sum(window.steps for window in windows) / seconds
    step_seconds = [step for window in windows for step in window.step_seconds]
    merged = [of_pass for window in windows for of_pass in window.merged]
    return {
        "clients": number,
        "steps_per_second": steps_per_second,
        "over_sequential": steps_per_second / local[1],
        "over_ideal": steps_per_second / local[number],
        "step_p50_ms": median(step_seconds) * 1e3,
        "step_p99_ms": percentile(step_seconds, 99) * 1e3,
        "mean_batch": sum(merged) / len(merged) if merged else None,
        "client_host_mib": host_bytes / MIB,
        "client_device_mib": max(window.device_bytes for window in windows) / MIB,
    }


@click.command()
@click.option("--small", is_flag=True, help="A tiny model on the CPU, for seconds.")
@click.option("--size", help="Batch size of a client: a name or ROWSxTOKENS.  [default: 2x128]")
@click.option("--seconds", type=float, help="Duration of one measurement.  [default: 3]")
@click.option("--threads", default=1, show_default=True, help="CPU threads of each process.")
@out_option
def main(small: bool, size: str | None, seconds: float | None, threads: int, out: Path) -> None:
    """Check and measure, print three tables, write them."""
    scale = SMALL if small else FULL
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch finds no CUDA device here; --small runs on the CPU")
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    batch = parse_size(size or scale.size)
    scale = replace(scale, seconds=seconds or scale.seconds)
    on = torch.cuda.get_device_name() if scale.device == "cuda" else "the CPU"
    began = time.perf_counter()

    paths = Report("gpu-paths", f"Errors of each path of the trunk's computation on {on}", out)
    failed = check_paths(scale, paths)
    paths.note("ppm: millionths of the largest magnitude of the exact numbers, which are those of double precision")
    paths.note("split over local: of the same dtype; 0 where all bits are equal")
    paths.publish()
    if scale.device == "cuda":
        transfers = Report("gpu-transfers", f"Copies between host memory and {on}", out)
        measure_transfers(torch.device(scale.device), transfers)
        transfers.publish()

    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        parameters = write_model(scale, model)
        local = local_steps_per_second(scale, model, batch, threads)
        out.mkdir(parents=True, exist_ok=True)
        serving = ["--model", directory, "--cut", scale.cut, "--device", scale.device]
        serving += ["--dtype", str(scale.dtype).removeprefix("torch."), "--threads", str(threads)]
        with trunk_daemon(*serving, log=out / "gpu.log") as daemon:
            first = [seconds_to_first_gradient(daemon["endpoint"], scale) for _ in range(2)]
            rows = client_rows(scale, model, batch, daemon["endpoint"], local, threads)
    description = f"Training steps of {parameters / 1e9:.2g} billion parameters, {batch.rows} x {batch.tokens} tokens"
    report = Report("gpu", f"{description}, {scale.dtype}, cut {scale.cut}, on {on}", out)
    for row in rows:
        report.add(**row)
    report.note(f"whole model, one process: {local[1]:.2f} steps/s for one client after the other")
    for number, steps in local.items():
        report.note(f"whole model, one process, {number} clients' rows in one batch: {steps:.2f} of their steps/s")
    report.note("seconds from connecting to the first gradient: " + ", then ".join(f"{one:.2f}" for one in first))
    report.note("client_device_mib: the most that torch reserved in one client, without its CUDA context")
    report.note(f"requests of up to {daemon['merge_below_tokens']} tokens share passes of {daemon['max_batch_tokens']}")
    report.note(f"the whole run took {time.perf_counter() - began:.0f} s")
    report.publish()
    if failed:
        raise SystemExit(f"out of tolerance: {', '.join(failed)}")


if __name__ == "__main__":
    main()
