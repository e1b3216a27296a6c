"""Measure small steps of a 4-layer Llama that is all trunk, through a daemon over the same layers here.

    python benchmarks/small_steps.py                       1 x 16 and 2 x 128 tokens, 1, 2 and 4 clients, one thread
    python benchmarks/small_steps.py --seconds 10

What is left of a step here is everything but arithmetic: calls of torch, messages, hand-overs between threads. Local
and daemon run in alternation; the ratio is that of neighbouring rounds. The daemon computes with as many threads
as the local model; its sockets and its clients have what the machine has beside them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from report import Report, interquartile, median, out_option
from servers import trunk_daemon
from transformers import LlamaConfig, LlamaModel

import zsl

HIDDEN, LAYERS = 256, 4
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=HIDDEN,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    max_position_embeddings=512,
)
SHAPES = ((1, 16), (2, 128))


def local_step(model: LlamaModel, rows: int, tokens: int) -> Callable[[], None]:
    """Forward and backward of the same layers, here."""
    activations, gradients = torch.randn(2, rows, tokens, HIDDEN)

    def step() -> None:
        leaf = activations.detach().requires_grad_()
        output = model(inputs_embeds=leaf, use_cache=False).last_hidden_state
        torch.autograd.grad(output, leaf, gradients)

    return step


def remote_step(trunk: zsl.TrunkClient, rows: int, tokens: int) -> Callable[[], None]:
    """Forward and backward through the daemon."""
    activations, gradients = torch.randn(2, rows, tokens, HIDDEN)

    def step() -> None:
        trunk.backward(trunk.forward(activations, keep=True), gradients)

    return step


def steps_per_second(step: Callable[[], None], seconds: float) -> float:
    """Count the runs of `step` in about the given seconds."""
    step()
    begun = time.perf_counter()
    steps = 0
    while (elapsed := time.perf_counter() - begun) < seconds:
        step()
        steps += 1
    return steps / elapsed


class Client:
    """A client process: told to run for some seconds, it answers with its steps per second."""

    def __init__(self, endpoint: str) -> None:
        command = [sys.executable, __file__, "--client", endpoint]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, rows: int, tokens: int, seconds: float) -> None:
        assert self._process.stdin is not None
        print(rows, tokens, seconds, file=self._process.stdin, flush=True)

    def result(self) -> float:
        assert self._process.stdout is not None
        return float(json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Client:
        self.begin(*SHAPES[0], 0)
        self.result()  # connected
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def run_client(endpoint: str) -> None:
    """The body of a client process."""
    torch.set_num_threads(1)
    with zsl.TrunkClient(endpoint) as trunk:
        for line in sys.stdin:
            rows, tokens, seconds = line.split()
            print(steps_per_second(remote_step(trunk, int(rows), int(tokens)), float(seconds)), flush=True)


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="Duration of one measurement.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each measurement.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of the local model, and of the daemon.")
@out_option
def main(seconds: float, rounds: int, threads: int, out: Path) -> None:
    """Measure steps per second of small models through a daemon, over the local model's."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LlamaModel(CONFIG).eval().requires_grad_(False)
    report = Report("small_steps", "Forward and backward of a Llama of 4 layers and hidden size 256, all trunk", out)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model.save_pretrained(directory)
        arguments = ["--model", directory, "--cut", f"0:{LAYERS}", "--threads", str(threads)]
        endpoint = stack.enter_context(trunk_daemon(*arguments))["endpoint"]
        processes: list[Client] = []
        for clients in (1, 2, 4):
            processes += [stack.enter_context(Client(endpoint)) for _ in range(clients - len(processes))]
            for rows, tokens in SHAPES:
                local = local_step(model, rows, tokens)
                locals_, remotes = [], []
                for _ in range(rounds):
                    locals_.append(steps_per_second(local, seconds))
                    for process in processes:
                        process.begin(rows, tokens, seconds)
                    remotes.append(sum(process.result() for process in processes))
                ratios = [remote / alone for remote, alone in zip(remotes, locals_, strict=True)]
                report.add(
                    shape=f"{rows} x {tokens}",
                    clients=clients,
                    local_steps_per_second=median(locals_),
                    daemon_steps_per_second=median(remotes),
                    over_local=median(ratios),
                    middle_half=interquartile(ratios),
                )
    report.note("wanted at 1 x 16: one client at least 0.8, four clients at least 1.2")
    report.publish()
    report.plot_lines("clients", "over_local", "shape", x_label="clients", y_label="steps/s over the local model's")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        run_client(sys.argv[2])
    else:
        main()
