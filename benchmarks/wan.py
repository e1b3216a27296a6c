"""Compare training steps over a wide-area link, with 1 to 4 micro-batches in flight, with its bandwidth limit.

    python benchmarks/wan.py                    100 Mbit/s each way, round trips of 20 and 100 ms; about two minutes
    python benchmarks/wan.py --steps 3          the median of three steps each; about five minutes

Client → `shaped_link.py` → `zsl-trunkd`, each in a process of its own. The limit is the time that the line needs for
the bytes that did pass in the busier direction, and nothing else: no delay, no computing. The model is wide and does
little, so that the line is what is measured and not the machine. A step takes 16 micro-batches, and begins and ends
with none in flight: to fill and to drain the line is part of it.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
import transformers
from report import Report, median, out_option
from servers import server_process, trunk_daemon
from trainee import Trainee, trainee
from transformers import LlamaConfig, LlamaForCausalLM

import zsl
from zsl.client.overlap import run_overlapped

ROUND_TRIPS_MS = (20, 100)
MBIT_PER_SECOND = 100
OVERLAPS = (1, 2, 4)
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_SHARE, AIM = 0.8, {"round_trip_ms": 100, "wire_dtype": "bfloat16", "overlap": 4}

# Wide where it crosses and narrow everywhere else, and no more layers than must be: a core of a CPU has to be done with
# a micro-batch long before the line is.
CUT, OUTER_LAYERS = "1:2", (0, 2)
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=1024,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
# Can four in flight fill the line? A micro-batch crosses each direction twice, with a tensor of S bytes. From its
# first byte to its last it takes 4 S / B (B: bandwidth) for the four crossings, two round trips R, and the time c of
# computing. A full direction does a micro-batch each 2 S / B, so four in flight fill it if
#     4 x 2 S / B >= 4 S / B + 2 R + c,   that is   S / B >= R / 2 + c / 4.
# With B = 12.5 MB/s, R = 100 ms and c = 100 ms that is S >= 0.94 MB. The default, 2 x 256 tokens of 1024 numbers, is
# 1.05 MB in bfloat16. Even then a step of n micro-batches takes more than the 2 n S / B of the limit: its last tensor
# has still to come back, (2 n + 1) S / B + R, and nothing crosses while its first bottom and its last are computed.
# With n = 16 and 50 ms for those, 0.92 of the limit can be reached.
ROWS, TOKENS = 2, 256

Counts = dict[str, int]


@dataclass(frozen=True)
class Measured:
    """Medians over steps."""

    seconds: float
    up_bytes: float
    down_bytes: float


def optimizer_step(trained: Trainee, samples: list[torch.Tensor], overlap: int) -> None:
    """One optimizer step over all samples, as `OverlapMixin` takes it."""

    def micro_batch(ids: torch.Tensor) -> None:
        (trained.model(input_ids=ids, labels=ids).loss / len(samples)).backward()

    tasks = [partial(micro_batch, ids) for ids in samples]
    if overlap == 1:
        for task in tasks:
            task()
    else:
        run_overlapped(tasks, in_flight=overlap)
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)


def measure(step: Callable[[], None], steps: int, counts: Callable[[], Counts]) -> Measured:
    """Time of each step, and the bytes that passed in it."""
    seconds, up, down = [], [], []
    for _ in range(steps):
        before, began = counts(), time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
        after = counts()
        up.append(after["up"] - before["up"])
        down.append(after["down"] - before["down"])
    return Measured(median(seconds), median(up), median(down))


def counts_at(port: int) -> Counts:
    """Bytes that passed the link in each direction."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile() as text:
        counts: Counts = json.load(text)
        return counts


@contextmanager
def client_at(endpoint: str, checkpoint: Path, wire_dtype: torch.dtype, sample: torch.Tensor) -> Iterator[Trainee]:
    """A warm client with LoRA on its layers."""
    trunk = zsl.RemoteTrunk(endpoint, wire_dtype=wire_dtype)
    trained = trainee(zsl.load_client(str(checkpoint), trunk), OUTER_LAYERS)
    optimizer_step(trained, [sample], overlap=1)
    yield trained
    trunk.close()


def write_checkpoint(directory: Path) -> Path:
    """The model, with seeded weights, as a user has one."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(directory)
    return directory


def note_aim(report: Report, share: float) -> None:
    """Add notes to the report on the targets and their results."""
    met = "met" if share >= LEAST_SHARE else "missed"
    aim = ", ".join(f"{name} {value}" for name, value in AIM.items())
    report.note(f"{aim}: {share:.2f} of the limit, wanted at least {LEAST_SHARE}: {met}")


@click.command()
@click.option("--micro-batches", default=16, show_default=True, help="Micro-batches of a step.")
@click.option(
    "--tokens", default=TOKENS, show_default=True, help=f"Tokens of each of the {ROWS} rows of a micro-batch."
)
@click.option("--steps", default=1, show_default=True, help="Measured steps of each setting; the median counts.")
@out_option
def main(micro_batches: int, tokens: int, steps: int, out: Path) -> None:
    """Measure, print one table, write it and a plot."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the daemon has the other core
    report = Report("wan", f"Steps of {micro_batches} micro-batches of {ROWS} x {tokens} x {CONFIG.hidden_size}", out)
    samples = list(torch.randint(CONFIG.vocab_size, (micro_batches, ROWS, tokens)))
    with (
        tempfile.TemporaryDirectory() as directory,
        trunk_daemon("--model", str(write_checkpoint(Path(directory))), "--cut", CUT, "--threads", "1") as daemon,
    ):
        checkpoint, endpoint = Path(directory), daemon["endpoint"]
        compute_seconds = {}
        for name, dtype in WIRE_DTYPES.items():
            with client_at(endpoint, checkpoint, dtype, samples[0]) as trained:
                step = partial(optimizer_step, trained, samples, overlap=1)
                compute_seconds[name] = measure(step, steps, lambda: {"up": 0, "down": 0}).seconds
        for round_trip_ms in ROUND_TRIPS_MS:
            link_arguments = ("--round-trip-ms", str(round_trip_ms), "--mbit-per-second", str(MBIT_PER_SECOND))
            to = endpoint.rpartition(":")[2]
            with server_process("shaped_link.py", "--to", to, *link_arguments) as link:
                for name, dtype in WIRE_DTYPES.items():
                    with client_at(f"127.0.0.1:{link['port']}", checkpoint, dtype, samples[0]) as trained:
                        for overlap in OVERLAPS:
                            step = partial(optimizer_step, trained, samples, overlap=overlap)
                            measured = measure(step, steps, partial(counts_at, link["counts_port"]))
                            line_seconds = max(measured.up_bytes, measured.down_bytes) * 8 / 1e6 / MBIT_PER_SECOND
                            setting = {"round_trip_ms": round_trip_ms, "wire_dtype": name, "overlap": overlap}
                            report.add(
                                **setting,
                                line=f"{round_trip_ms} ms, {name}",
                                step_s=measured.seconds,
                                compute_step_s=compute_seconds[name],
                                up_mb_per_step=measured.up_bytes / 1e6,
                                down_mb_per_step=measured.down_bytes / 1e6,
                                limit_steps_per_s=1 / line_seconds,
                                steps_per_s=1 / measured.seconds,
                                share_of_limit=line_seconds / measured.seconds,
                            )
                            if setting == AIM:
                                note_aim(report, line_seconds / measured.seconds)
    report.note("compute_step_s: a step with one micro-batch in flight, directly at the daemon.")
    report.note("share_of_limit: a step fills and drains the line, so that 1 is out of reach; see the comment at ROWS.")
    report.publish()
    report.plot_bars(
        "line",
        "share_of_limit",
        "overlap",
        x_label=f"round trip, dtype on the line of {MBIT_PER_SECOND} Mbit/s each way",
        y_label="steps per second / what the bandwidth allows",
    )


if __name__ == "__main__":
    main()
