"""Measure generation with a cache: sessions that decode at once through one daemon, the local model, and one session
beside clients that train.

    python benchmarks/decode.py                            SmolLM2, 1 to 16 sessions, with merging and without
    python benchmarks/decode.py --part lengths --lengths 100,900 --tokens 100
    python benchmarks/decode.py --part training --trainers 4 --shares 0.5,0.2 --seconds 60

Each session is a process with the client's layers and a prompt of its own. They are compared with as many processes
that have the whole model each. One alone has as many threads as the daemon, several share them, at least one each.
Rounds of all ways alternate; the ratios are those of neighbouring rounds.
Beside training one session writes texts one after the other, and only tokens of the measured seconds count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import Any

import click
import torch
from clients import Clients
from options import cut_option, model_option
from report import Report, median, out_option, percentile
from servers import trunk_daemon
from sizes import Size, parse_size
from turns import Turn

import zsl
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.trunk.openmp import SPINS

PROMPT_TOKENS = 16
PARTS = ("sessions", "lengths", "training")
LOCAL = -1  # in place of a daemon's number: the whole model in the session's own process


class Stamps:
    """Streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: Any, prompt_tokens: int, tokens: int, seed: int = 0) -> list[float]:
    """Generate, and return the seconds until the first token, and from each to the next."""
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
    return [after - before for before, after in pairwise(stamps.times)]  # the first is the prompt's


class Session:
    """A client process of several daemons: told to decode so many tokens through one, it answers with their seconds.

    It decodes with the whole model of its own too, `LOCAL`."""

    def __init__(self, model: str, seed: int, endpoints: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--client", model, str(seed), *endpoints]
        environment = {"GOMP_SPINCOUNT": SPINS, **os.environ}  # as zsl's own commands set it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def begin(self, endpoint: int, tokens: int, prompt_tokens: int = PROMPT_TOKENS, threads: int = 1) -> None:
        assert self._process.stdin is not None
        print(endpoint, tokens, prompt_tokens, threads, file=self._process.stdin, flush=True)

    def seconds(self) -> list[float]:
        """Return the seconds until the first token, and from each to the next."""
        assert self._process.stdout is not None
        seconds: list[float] = json.loads(self._process.stdout.readline())
        return seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def run_client(model: str, seed: int, endpoints: Sequence[str]) -> None:
    """The body of a client process."""
    with ExitStack() as stack:
        trunks = [stack.enter_context(zsl.RemoteTrunk(endpoint)) for endpoint in endpoints]
        models = dict(enumerate(zsl.load_client(model, trunk).eval() for trunk in trunks))
        for line in sys.stdin:
            endpoint, tokens, prompt_tokens, threads = map(int, line.split())
            if endpoint == LOCAL and LOCAL not in models:
                models[LOCAL] = load_whole(resolve(model)).eval()
            torch.set_num_threads(threads)
            print(json.dumps(decode(models[endpoint], prompt_tokens, tokens, seed)), flush=True)


def tokens_per_second(sessions: Sequence[Session], endpoint: int, tokens: int, threads: int) -> float:
    """Have all sessions decode so many tokens at once; return what they have together in a second.

    One alone has as many threads as the local model, several share them."""
    for session in sessions:
        session.begin(endpoint, tokens, threads=max(1, threads // len(sessions)))
    return sum((tokens - 1) / sum(session.seconds()[1:]) for session in sessions)


def measure_sessions(
    report: Report, model: str, on: str, arguments: Sequence[str], numbers: str, tokens: int, rounds: int
) -> None:
    """Add tokens per second of sessions that decode at once: with merging, without, and each with the whole model."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        off = stack.enter_context(trunk_daemon(*arguments, "--merge-below-tokens", "0"))["endpoint"]
        running: list[Session] = []
        for number in map(int, numbers.split(",")):
            fresh = [Session(model, seed, (on, off)) for seed in range(len(running), number)]
            for session in fresh:
                stack.callback(session.close)
            running += fresh
            ways = (LOCAL, 0, 1)
            for way in ways:
                tokens_per_second(running, way, 4, threads)  # connected and warm
            found = [[tokens_per_second(running, way, tokens, threads) for way in ways] for _ in range(rounds)]
            report.add(
                sessions=number,
                local_processes=median([one[0] for one in found]),
                tokens_per_second=median([one[1] for one in found]),
                merging_off=median([one[2] for one in found]),
                over_merging_off=median([one[1] / one[2] for one in found]),
                over_local=median([one[1] / one[0] for one in found]),
            )
    report.note("over_local: as many processes that have the whole model each")
    report.note("wanted: one session at least 0.75 of local, 8 sessions at least 2.5 x merging off")


def measure_lengths(report: Report, model: str, endpoint: str, lengths: str, tokens: int) -> None:
    """Add the time of a token behind a short and a long text, through a daemon and locally."""
    at = [int(length) for length in lengths.split(",")]
    local = load_whole(resolve(model)).eval()
    with zsl.RemoteTrunk(endpoint) as trunk:
        split = zsl.load_client(model, trunk).eval()
        decode(split, 4, 4)  # warm
        for name, one in (("local", local), ("through the daemon", split)):
            early, late = (1000 * median(decode(one, length, tokens)[1:]) for length in at)
            report.add(model=name, early_ms=early, late_ms=late, late_over_early=late / early)
    report.note(f"early_ms and late_ms: of a token behind {at[0]} and {at[1]} others")


def texts_for(session: Session, seconds: float, tokens: int, prompt_tokens: int) -> tuple[list[float], list[float]]:
    """Have a session write texts for so long; return the seconds of first tokens, and from each token to the next."""
    first: list[float] = []
    between: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        session.begin(0, tokens, prompt_tokens)
        text = session.seconds()
        first.append(text[0])
        until = list(accumulate(text))
        between += [gap for gap, at in zip(text[1:], until[1:], strict=True) if began + at <= end]
    return first, between


def measure_beside_training(
    report: Report,
    model: str,
    cut: str,
    endpoint_of_first: str,
    arguments: Sequence[str],
    shares: Sequence[str],
    trainers: int,
    size: Size,
    tokens: int,
    prompt_tokens: int,
    seconds: float,
    rounds: int,
) -> None:
    """Add the times of one session's tokens, alone and beside clients that train, and what these do beside it."""

    def add(share: str, clients: int, first: list[float], between: list[float], steps: list[float]) -> None:
        row: dict[str, Any] = {"decode_share": share, "trainers": clients}
        if first:
            row["first_token_ms"] = 1000 * median(first)
        if between:
            row["between_p50_ms"], row["between_p99_ms"] = (1000 * percentile(between, part) for part in (50, 99))
            row["tokens_measured"] = len(between)
        if steps:
            row["training_steps_per_second"] = median(steps)
        report.add(**row)

    with Clients(threads=1) as clients, ThreadPoolExecutor(1) as thread:
        clients.grow_to(trainers)
        for place, share in enumerate(shares):
            with ExitStack() as stack:
                endpoint = endpoint_of_first
                if place:
                    endpoint = stack.enter_context(trunk_daemon(*arguments, "--decode-share", share))["endpoint"]
                session = Session(model, 0, [endpoint])
                stack.callback(session.close)
                session.begin(0, 4, prompt_tokens)
                session.seconds()  # connected and warm
                turn = Turn("whole", "zsl", endpoint, model, cut, size.rows, size.tokens)
                if place == 0:
                    add(share, 0, *texts_for(session, seconds, tokens, prompt_tokens), [])
                    clients.prepare(turn)
                    add(share, trainers, [], [], [sum(one.steps for one in clients.measure(seconds)) / seconds])
                first: list[float] = []
                between: list[float] = []
                steps: list[float] = []
                for _ in range(rounds):
                    clients.prepare(turn)
                    training = thread.submit(clients.measure, seconds)
                    of_texts = texts_for(session, seconds, tokens, prompt_tokens)
                    first, between = first + of_texts[0], between + of_texts[1]
                    steps.append(sum(one.steps for one in training.result()) / seconds)
                add(share, trainers, first, between, steps)
    report.note(f"first_token_ms: median, behind a prompt of {prompt_tokens} tokens; trainers: steps of {size.name}")


@click.command()
@model_option
@cut_option
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="Measure this; may be repeated.  [default: all]"
)
@click.option("--sessions", default="1,2,4,8,16", show_default=True, help="How many decode at once.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of each text.")
@click.option("--lengths", default="100,900", show_default=True, help="Tokens before those whose time is compared.")
@click.option("--trainers", default=4, show_default=True, help="Clients that train beside one session.")
@click.option(
    "--shares", default="0.5,0.2", show_default=True, help="Values of --decode-share; 0.5 is the daemon's own."
)
@click.option("--train-size", default="1x128", show_default=True, help="Rows x tokens of a training step.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Tokens of the prompts beside training.")
@click.option("--seconds", default=60.0, show_default=True, help="Seconds of each measurement beside training.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each measurement.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of the local model, and of the daemon.")
@out_option
def main(
    model: str,
    cut: str,
    parts: tuple[str, ...],
    sessions: str,
    tokens: int,
    lengths: str,
    trainers: int,
    shares: str,
    train_size: str,
    prompt_tokens: int,
    seconds: float,
    rounds: int,
    threads: int,
    out: Any,
) -> None:
    """Measure tokens per second of sessions that decode at once, the time of a token by the text before it, and the
    times of one session's tokens beside clients that train."""
    torch.set_num_threads(threads)
    report = Report("decode", f"Generation with a cache: {model}, trunk {cut}, {tokens} tokens a text", out)
    arguments = ["--model", model, "--cut", cut, "--threads", str(threads)]
    size, of_shares, chosen = parse_size(train_size), shares.split(","), parts or PARTS
    with trunk_daemon(*arguments, "--decode-share", of_shares[0]) as daemon:
        on = daemon["endpoint"]
        if "sessions" in chosen:
            measure_sessions(report, model, on, arguments, sessions, tokens, rounds)
        if "lengths" in chosen:
            measure_lengths(report, model, on, lengths, tokens)
        if "training" in chosen:
            measure_beside_training(
                report, model, cut, on, arguments, of_shares, trainers, size, tokens, prompt_tokens, seconds, rounds
            )
    report.publish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        run_client(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        main()
