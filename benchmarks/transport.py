"""Measure round trips of zsl's protocol, gRPC and a bare ZeroMQ echo over loopback TCP, without computing.

Echo servers, each in its own process. They take turns in random order, round by round: what else the machine does hits
all alike, and so does what the one before leaves in the caches. A ratio is the median over the ratios of the rounds.
zsl and gRPC are timed from tensor to tensor, the bare echo from buffer to buffer. MB/s counts the payload once in each
direction.

    python benchmarks/transport.py
    python benchmarks/transport.py --rounds 20          a short run
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import torch
from baselines.bare_zmq import BareClient
from baselines.grpc_trunk import GrpcTrunk
from echo_trunk import HIDDEN
from report import Report, interquartile, median, out_option, percentile
from servers import server_process

from zsl.client.trunk_client import TrunkClient

WARM_UP_ROUNDS = 5


@dataclass(frozen=True)
class Payload:
    """A size of message. Small ones are quick, and take `rounds_factor` times the rounds."""

    name: str
    tokens: int
    rounds_factor: int
    most_over_bare: float  # the aims for zsl
    least_grpc_over_zsl: float

    def tensor(self) -> torch.Tensor:
        return torch.randn(1, self.tokens, HIDDEN)


PAYLOADS = (
    Payload("2 kB", 1, 10, most_over_bare=2.2, least_grpc_over_zsl=1.5),
    Payload("0.8 MB", 391, 3, most_over_bare=1.8, least_grpc_over_zsl=2.0),
    Payload("8 MB", 4096, 1, most_over_bare=1.4, least_grpc_over_zsl=2.6),
)

RoundTrip = Callable[[torch.Tensor], torch.Tensor]


def measure(round_trips: dict[str, RoundTrip], tensor: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round trip in each round. The order of a round is random."""
    for name, round_trip in round_trips.items():
        for _ in range(WARM_UP_ROUNDS):
            assert torch.equal(round_trip(tensor), tensor), f"{name} does not echo"
    seconds: dict[str, list[float]] = {name: [] for name in round_trips}
    order, random = list(round_trips), Random(0)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            round_trips[name](tensor)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(of: list[float], over: list[float]) -> list[float]:
    """The ratio in each round."""
    return [a / b for a, b in zip(of, over, strict=True)]


def add_rows(report: Report, payload: Payload, nbytes: int, seconds: dict[str, list[float]]) -> None:
    """One row for each transport."""
    for name, own in seconds.items():
        over_bare, over_zsl = ratios(own, seconds["bare"]), ratios(own, seconds["zsl"])
        report.add(
            payload=payload.name,
            transport=name,
            rounds=len(own),
            median_ms=median(own) * 1e3,
            p99_ms=percentile(own, 99) * 1e3,
            mb_per_second=2 * nbytes / 1e6 / median(own),
            over_bare=median(over_bare),
            over_bare_middle_half=interquartile(over_bare),
            over_zsl=median(over_zsl),
            over_zsl_middle_half=interquartile(over_zsl),
        )


def note_aims(report: Report, payload: Payload, seconds: dict[str, list[float]]) -> None:
    """Add notes to the report on the targets of zsl and their results."""
    over_bare = median(ratios(seconds["zsl"], seconds["bare"]))
    met = "met" if over_bare <= payload.most_over_bare else "missed"
    report.note(f"{payload.name}: zsl / bare {over_bare:.2f}, wanted at most {payload.most_over_bare}: {met}")
    over_zsl = median(ratios(seconds["grpc"], seconds["zsl"]))
    met = "met" if over_zsl >= payload.least_grpc_over_zsl else "missed"
    report.note(f"{payload.name}: grpc / zsl {over_zsl:.2f}, wanted at least {payload.least_grpc_over_zsl}: {met}")


@click.command()
@click.option("--rounds", default=200, show_default=True, help="Rounds with the largest payload.")
@out_option
def main(rounds: int, out: Path) -> None:
    """Measure, print one table, write it and a plot."""
    report = Report("transport", "Round trips of one float32 tensor to an echo in another process, loopback TCP", out)
    with ExitStack() as stack:

        def start(script: str, *arguments: str) -> str:
            return f"127.0.0.1:{stack.enter_context(server_process(script, *arguments))['port']}"

        bare = stack.enter_context(BareClient(start("baselines/bare_zmq.py")))
        zsl, driven = (stack.enter_context(TrunkClient(start("echo_trunk.py"))) for _ in range(2))
        zsl.connect()
        driven.connect()
        grpc = stack.enter_context(GrpcTrunk(start("baselines/grpc_trunk.py", "--echo")))

        def by_thread(tensor: torch.Tensor) -> torch.Tensor:
            """The same, with the connection's I/O thread at the socket instead of the caller."""
            step, future = driven.submit_forward(tensor)
            driven.finish_forward(step, driven.wait(future))
            return step.output

        round_trips: dict[str, RoundTrip] = {
            "bare": lambda tensor: torch.frombuffer(bare.echo(tensor.numpy().data), dtype=tensor.dtype).view_as(tensor),
            "zsl": lambda tensor: zsl.forward(tensor).output,
            "zsl by thread": by_thread,
            "grpc": lambda tensor: grpc.forward(tensor)[1],
        }
        for payload in PAYLOADS:
            tensor = payload.tensor()
            seconds = measure(round_trips, tensor, rounds * payload.rounds_factor)
            add_rows(report, payload, tensor.nbytes, seconds)
            note_aims(report, payload, seconds)
    report.publish()
    report.plot_bars(
        "payload",
        "over_bare",
        "transport",
        x_label="payload (each way)",
        y_label="round trip / that of the bare ZeroMQ echo (median of rounds)",
    )


if __name__ == "__main__":
    main()
