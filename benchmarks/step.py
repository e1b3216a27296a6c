"""Compare a split client's training step with the whole local model's, in float32 and bfloat16.

A step is forward, backward and optimizer. All variants have the same number of threads and take turns, so that a ratio
within a round is free of other load.

    python benchmarks/step.py                        SmolLM2-135M-Instruct, 2 x 128 tokens
    python benchmarks/step.py --model random:gpt2 --rounds 10
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click
import torch
import transformers
from options import model_option
from report import Report, interquartile, median, out_option
from servers import trunk_daemon
from trainee import Trainee, trainee

import zsl
from zsl.client.remote import RemoteTrunk
from zsl.models.loading import load_whole
from zsl.models.reference import ModelReference, resolve

DTYPES = ("float32", "bfloat16")
# What is compared, and what is wanted of it.
RATIOS = (
    ("split float32", "local float32", "at most 1.05"),
    ("split bfloat16", "local bfloat16", "at most 1.05"),
    ("local float32", "split bfloat16", "at least 1.5"),
    ("local float32", "local bfloat16", ""),
)


def trainees(reference: ModelReference, threads: int, adapted: str, stack: ExitStack) -> dict[str, Trainee]:
    """The split client and the whole model, in each dtype, with the same adapters. `adapted`: "client" or "all"."""
    made = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        daemon = stack.enter_context(
            trunk_daemon("--model", reference.text, "--threads", str(threads), "--dtype", name)
        )
        trunk = RemoteTrunk(daemon["endpoint"])
        client = zsl.load_client(reference, trunk, dtype=dtype)
        stack.callback(trunk.close)
        cut = trunk.client.welcome.cut
        layers = list(range(trunk.client.welcome.model.layers))
        if adapted == "client":
            layers = [*layers[: cut.start], *layers[cut.stop :]]
        made[f"split {name}"] = trainee(client, layers)
        made[f"local {name}"] = trainee(load_whole(reference, dtype), layers)
    return made


@click.command()
@model_option
@click.option("--rows", default=2, show_default=True, help="Rows of a batch.")
@click.option("--tokens", default=128, show_default=True, help="Tokens of a row.")
@click.option(
    "--layers",
    "adapted",
    type=click.Choice(["client", "all"]),
    default="client",
    show_default=True,
    help="Layers with adapters.",
)
@click.option("--rounds", default=20, show_default=True, help="Rounds of all variants.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="CPU threads of each process.")
@out_option
def main(model: str, rows: int, tokens: int, adapted: str, rounds: int, threads: int, out: Path) -> None:
    """Measure, and print two tables."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    reference = resolve(model)
    what = f"A training step of {model}, {rows} x {tokens} tokens, adapters on {adapted} layers"
    report = Report("step", f"{what}, {threads} threads each", out)
    with ExitStack() as stack:
        made = trainees(reference, threads, adapted, stack)
        ids = torch.randint(reference.config.get_text_config().vocab_size, (rows, tokens))
        for _ in range(2):  # all warm
            losses = {name: one.step(ids)[0] for name, one in made.items()}
        assert losses["split float32"] == losses["local float32"], f"the losses differ: {losses}"
        seconds: dict[str, list[float]] = {name: [] for name in made}
        order = list(made)
        for _ in range(rounds):
            for name in order:
                seconds[name].append(made[name].step(ids)[1].total)
            order.reverse()
    for name, values in seconds.items():
        report.add(what=name, step_ms=median(values) * 1000, middle_half=tuple(v * 1000 for v in interquartile(values)))
    for over, under, wanted in RATIOS:
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        line = (
            f"{over} / {under}: {median(ratios):.3f} (middle half {'{:.3f} to {:.3f}'.format(*interquartile(ratios))})"
        )
        report.note(line + (f", wanted {wanted}" if wanted else ""))
    report.note(f"float32 losses equal bit for bit in the warm-up: {losses['split float32']!r}")
    report.note(f"bfloat16 losses in the warm-up: split {losses['split bfloat16']}, local {losses['local bfloat16']}")
    report.publish()
    report.plot_bars("what", "step_ms", "what", x_label="", y_label="step (ms)")


if __name__ == "__main__":
    main()
