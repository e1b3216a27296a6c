"""Compare `zsl-train` that starts its own daemon with one that trains through a daemon beside it.

    bin/bench embedded                      examples/smollm2.toml, 14 steps, 3 rounds
    bin/bench embedded --before DIR         and with the embedded trunk of another checkout

The arrangements take turns. A step is the median of the `seconds` in `metrics.jsonl`, without the first two steps of a
run. The first step ends that many seconds after the command was started; the daemon beside it had loaded before.
Memory is the PSS (Linux only) of the command and its daemon after the last step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
from memory_use import MIB, pss_bytes
from report import Report, interquartile, median, out_option
from servers import trunk_daemon

from zsl.training.config.config import read_config

ROOT = Path(__file__).parent.parent
RUN_SECONDS = 1800
WARM_UP_STEPS = 2
MOST_OVER_BESIDE = 1.0  # the aim
TRAIN = [sys.executable, "-c", "from zsl.cli.train import train; train(prog_name='zsl-train')"]


@dataclass(frozen=True)
class Run:
    """One run of `zsl-train`. `steps`: seconds of its steps, warm."""

    steps: list[float]
    first_step_seconds: float
    pss: int


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def train(config: Path, steps: int, options: list[str], tree: Path, daemons: list[int]) -> Run:
    """Run `zsl-train` of a checkout, and look at its memory at the last step."""
    with tempfile.TemporaryDirectory() as out:
        command = [*TRAIN, str(config), "--steps", str(steps), "--save-dir", out, "--restart", *options]
        began = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(tree)}
        ) as process:
            assert process.stdout is not None
            limit = threading.Timer(RUN_SECONDS, process.kill)
            limit.start()
            first_step_seconds, pss = 0.0, 0
            for line in process.stdout:
                if f"step 1/{steps}:" in line:
                    first_step_seconds = time.perf_counter() - began
                if f"step {steps}/{steps}:" in line:
                    pss = sum(map(pss_bytes, [process.pid, *children(process.pid), *daemons]))
            limit.cancel()
        if process.returncode:
            raise RuntimeError(f"zsl-train ended with {process.returncode}")
        lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
        seconds = [line["seconds"] for line in lines if "loss" in line]
    return Run(seconds[WARM_UP_STEPS:], first_step_seconds, pss)


@click.command()
@click.option(
    "--config",
    default=ROOT / "examples/smollm2.toml",
    type=click.Path(path_type=Path),
    show_default=True,
    help="Configuration of the runs.",
)
@click.option("--steps", default=14, show_default=True, help="Steps of each run.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each arrangement.")
@click.option(
    "--before", type=click.Path(path_type=Path), help="Another checkout, whose embedded trunk is measured too."
)
@out_option
def main(config: Path, steps: int, rounds: int, before: Path | None, out: Path) -> None:
    """Train in each arrangement, print a table, write it."""
    out.mkdir(parents=True, exist_ok=True)
    report = Report("embedded", f"Steps of zsl-train, {config.name}, without --server and with a daemon beside it", out)
    read = read_config(config, overrides={})
    cut = ("--cut", read.trunk.cut) if read.trunk.cut else ()
    with ExitStack() as stack:
        daemon = stack.enter_context(trunk_daemon("--model", read.model.name, *cut, log=out / "embedded.log"))
        beside = (["--server", daemon["endpoint"].removeprefix("tcp://")], ROOT, [daemon["pid"]])
        arrangements: dict[str, tuple[list[str], Path, list[int]]] = {"embedded": ([], ROOT, []), "beside": beside}
        if before is not None:
            arrangements["embedded before"] = ([], before.resolve(), [])
        runs: dict[str, list[Run]] = {name: [] for name in arrangements}
        for _ in range(rounds):
            for name, arrangement in arrangements.items():
                runs[name].append(train(config, steps, *arrangement))
    medians = {name: [median(run.steps) for run in own] for name, own in runs.items()}
    for name, own in runs.items():
        ratios = [mine / other for mine, other in zip(medians[name], medians["beside"], strict=True)]
        report.add(
            arrangement=name,
            step_s=median(medians[name]),
            over_beside=median(ratios),
            over_beside_middle_half=interquartile(ratios),
            first_step_after_s=median([run.first_step_seconds for run in own]),
            pss_mib=median([run.pss for run in own]) / MIB,
        )
        if name == "embedded":
            met = "met" if median(ratios) <= MOST_OVER_BESIDE else "missed"
            report.note(f"embedded / beside {median(ratios):.2f}, wanted at most {MOST_OVER_BESIDE}: {met}")
    report.publish()


if __name__ == "__main__":
    main()
