"""Measure generation with a cache: sessions that decode at once through one daemon, and the local model.

    python benchmarks/decode.py                            SmolLM2, 1, 2, 4 and 8 sessions, with merging and without
    python benchmarks/decode.py --sessions 1 --lengths 100,900 --tokens 100

Each session is a process with the client's layers, one thread, and a prompt of its own. The local model decodes one
text with as many threads as the daemon. Rounds of all ways alternate; the ratios are those of neighbouring rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import click
import torch
from options import cut_option, model_option
from report import Report, median, out_option
from servers import trunk_daemon

import zsl
from zsl.models.loading import load_whole
from zsl.models.reference import resolve

PROMPT_TOKENS = 16


class Stamps:
    """Streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: Any, prompt_tokens: int, tokens: int, seed: int = 0) -> list[float]:
    """Generate, and return the seconds from each token to the next."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size - 5, (1, prompt_tokens), generator=random)
    stamps = Stamps()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=stamps,
    )
    times = stamps.times[1:]  # the first is the prompt's
    return [after - before for before, after in pairwise(times)]


class Session:
    """A client process of several daemons: told to decode so many tokens through one, it answers with its seconds."""

    def __init__(self, model: str, seed: int, endpoints: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--client", model, str(seed), *endpoints]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, endpoint: int, tokens: int) -> None:
        assert self._process.stdin is not None
        print(endpoint, tokens, file=self._process.stdin, flush=True)

    def seconds(self) -> float:
        assert self._process.stdout is not None
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def run_client(model: str, seed: int, endpoints: Sequence[str]) -> None:
    """The body of a client process."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        trunks = [stack.enter_context(zsl.RemoteTrunk(endpoint)) for endpoint in endpoints]
        models = [zsl.load_client(model, trunk).eval() for trunk in trunks]
        for line in sys.stdin:
            endpoint, tokens = map(int, line.split())
            print(sum(decode(models[endpoint], PROMPT_TOKENS, tokens, seed)), flush=True)


def tokens_per_second(sessions: Sequence[Session], endpoint: int, tokens: int) -> float:
    """Have all sessions decode so many tokens at once; return what they have together in a second."""
    for session in sessions:
        session.begin(endpoint, tokens)
    return sum((tokens - 1) / session.seconds() for session in sessions)


@click.command()
@model_option
@cut_option
@click.option("--sessions", default="1,2,4,8", show_default=True, help="How many decode at once.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of each text.")
@click.option("--lengths", default="100,900", show_default=True, help="Tokens before those whose time is compared.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each measurement.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of the local model, and of the daemon.")
@out_option
def main(model: str, cut: str, sessions: str, tokens: int, lengths: str, rounds: int, threads: int, out: Any) -> None:
    """Measure tokens per second of sessions that decode at once, and the time of a token by the text before it."""
    torch.set_num_threads(threads)
    local = load_whole(resolve(model)).eval()
    report = Report("decode", f"Generation with a cache: {model}, trunk {cut}, {tokens} tokens a text", out)
    with ExitStack() as stack:
        arguments = ["--model", model, "--cut", cut, "--threads", str(threads)]
        on = stack.enter_context(trunk_daemon(*arguments))["endpoint"]
        off = stack.enter_context(trunk_daemon(*arguments, "--merge-below-tokens", "0"))["endpoint"]
        running: list[Session] = []
        for number in map(int, sessions.split(",")):
            fresh = [Session(model, seed, (on, off)) for seed in range(len(running), number)]
            for session in fresh:
                stack.callback(session.close)
            running += fresh
            for endpoint in range(2):
                tokens_per_second(running, endpoint, 4)  # connected and warm
            found: list[tuple[float, ...]] = []
            for _ in range(rounds):
                alone = (tokens - 1) / sum(decode(local, PROMPT_TOKENS, tokens))
                found.append((alone, *(tokens_per_second(running, endpoint, tokens) for endpoint in range(2))))
            report.add(
                sessions=number,
                local_tokens_per_second=median([one[0] for one in found]),
                tokens_per_second=median([one[1] for one in found]),
                merging_off=median([one[2] for one in found]),
                over_merging_off=median([one[1] / one[2] for one in found]),
                over_local=median([one[1] / one[0] for one in found]),
            )
        with zsl.RemoteTrunk(on) as trunk:
            split = zsl.load_client(model, trunk).eval()
            at = [int(length) for length in lengths.split(",")]
            decode(split, 4, 4)  # warm
            for name, one in (("local", local), ("through the daemon", split)):
                early, late = (1000 * median(decode(one, length, tokens)) for length in at)
                report.add(model=name, early_ms=early, late_ms=late, late_over_early=late / early)
    report.note(f"early_ms and late_ms: of a token behind {at[0]} and {at[1]} others")
    report.note("wanted: one session at least 0.75 of local, 8 sessions at least 2.5 x merging off")
    report.publish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        run_client(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        main()
