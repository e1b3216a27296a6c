"""Count the bytes of optimizer steps at a relay between client and daemon: adapters on the client's layers or on all.

    python benchmarks/adapter_bytes.py                 SmolLM2-135M-Instruct, 2 x 128 tokens, rank 8

Client → relay → `zsl-trunkd`. The relay counts what TCP carries each way: messages, ZeroMQ's framing, and the pings of
the client's second connection. The part of the adapters is the client's own count. With more than one micro-batch a
step, the daemon sums up the gradients of the trunk's adapters, as for `Trainer` with `gradient_accumulation_steps`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import transformers
from options import cut_option, model_option, size_option
from report import Report, out_option
from servers import trunk_daemon
from sizes import Size
from trainee import Trainee, trainee

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the relay is that of the tests

import zsl
from support.faulty_link import FaultyLink
from zsl.client.gradient_sum import StepSums, micro_batch
from zsl.models.reference import ModelReference, resolve

MB = 1e6


@dataclass(frozen=True)
class Setting:
    """`layers`: those with adapters. `dtype`: of the trunk's adapters on the wire."""

    layers: str
    dtype: torch.dtype | None
    micro_batches: int

    @property
    def name(self) -> str:
        return self.layers if self.dtype is None else f"{self.layers}, {str(self.dtype).removeprefix('torch.')}"


def settings(micro_batches: tuple[int, ...]) -> Iterator[Setting]:
    """Yield each setting."""
    for number in micro_batches:
        yield Setting("client", None, number)
        for dtype in (torch.float32, torch.bfloat16):
            yield Setting("all", dtype, number)


@contextmanager
def client_of(reference: ModelReference, endpoint: str, setting: Setting) -> Iterator[tuple[Trainee, zsl.TrunkClient]]:
    """A client with LoRA on the layers of a setting."""
    with zsl.RemoteTrunk(endpoint, adapter_wire_dtype=setting.dtype) as trunk:
        model = zsl.load_client(reference, trunk)
        cut, every = trunk.client.welcome.cut, range(trunk.client.welcome.model.layers)
        layers = [layer for layer in every if setting.layers == "all" or not cut.start <= layer < cut.stop]
        yield trainee(model, layers), trunk.client


def optimizer_step(trained: Trainee, samples: list[torch.Tensor]) -> None:
    """One optimizer step over all samples."""
    sums = StepSums()
    for number, ids in enumerate(samples):
        with micro_batch(sums, is_last=number == len(samples) - 1):
            (trained.model(input_ids=ids, labels=ids).loss / len(samples)).backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)


@click.command()
@model_option
@cut_option
@size_option("a micro-batch")
@click.option(
    "--micro-batches", multiple=True, default=(1, 8), show_default=True, help="Micro-batches of a step; repeat it."
)
@click.option("--steps", default=2, show_default=True, help="Counted steps of each setting, after one other.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of client and daemon.")
@out_option
def main(model: str, cut: str, size: Size, micro_batches: tuple[int, ...], steps: int, threads: int, out: Path) -> None:
    """Count, print one table, write it and a plot."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    reference = resolve(model)
    vocabulary = reference.config.get_text_config().vocab_size
    samples = list(torch.randint(vocabulary, (max(micro_batches), size.rows, size.tokens)))
    what = f"Bytes of a step of {model}, cut {cut}, LoRA of rank 8, micro-batches of {size.rows} x {size.tokens} tokens"
    report = Report("adapter_bytes", what, out)
    serving = ("--model", model, "--cut", cut, "--threads", str(threads))
    with trunk_daemon(*serving) as daemon, FaultyLink(int(daemon["endpoint"].rpartition(":")[2])) as relay:
        for setting in settings(micro_batches):
            with client_of(reference, relay.endpoint, setting) as (trained, client):
                optimizer_step(trained, samples[: setting.micro_batches])
                passed, traffic = relay.passed_bytes, client.traffic
                for _ in range(steps):
                    optimizer_step(trained, samples[: setting.micro_batches])
                client.status()  # so that all has passed
                after, traffic = relay.passed_bytes, client.traffic - traffic
                report.add(
                    adapters=setting.name,
                    micro_batches=setting.micro_batches,
                    up_mb=(after["up"] - passed["up"]) / steps / MB,
                    down_mb=(after["down"] - passed["down"]) / steps / MB,
                    adapter_up_mb=traffic.adapter_bytes_up / steps / MB,
                    adapter_down_mb=traffic.adapter_bytes_down / steps / MB,
                )
    report.note("of an optimizer step; adapter_*: the part of the trunk's adapters up, and of their gradients down")
    report.publish()
    report.plot_bars(
        "micro_batches", "up_mb", "adapters", x_label="micro-batches of a step", y_label="bytes up a step (MB)"
    )


if __name__ == "__main__":
    main()
