"""Measure a daemon's memory growth against its own count under `--stash-memory`, and the memory freed afterwards.

Each case has its own daemon: steps are held, or one large step runs forward and backward; then the session ends.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from memory_use import MIB
from options import cut_option, model_option
from report import Report, out_option
from servers import trunk_daemon

from zsl.client.trunk_client import TrunkClient
from zsl.text.byte_size import parse_size

TIMEOUT_SECONDS = 600.0  # of a request
IDLE_SECONDS = 15.0  # until a daemon has given back what it freed


class Case(NamedTuple):
    """Steps that are held; `lengths`: of the sequences in the one row of each, repeated; `masked`: with padding."""

    name: str
    steps: int
    rows: int
    tokens: int
    lengths: tuple[int, ...] = ()
    masked: bool = False

    def beside(self) -> dict[str, Any]:
        """Return the masks and other tensors that are sent with the activations."""
        if self.lengths:
            return {"lengths": torch.tensor(self.lengths * (self.tokens // sum(self.lengths)))}
        if not self.masked:
            return {}
        mask = torch.ones(self.rows, self.tokens, dtype=torch.long)
        mask[:, :3] = 0
        return {"attention_mask": mask}


CASES = [
    Case("300 steps of one token", 300, 1, 1),
    Case("alternating lengths, 4 x 1,536 tokens", 4, 1, 1536, (1, 2)),
    Case("a mask, 1 x 2,048 tokens", 1, 1, 2048, masked=True),
    Case("8 x 512 tokens", 1, 8, 512),
    Case("1 x 4,096 tokens", 1, 1, 4096),
]


def status_bytes(pid: int, field: str) -> int:
    """A size from the kernel's status of a process: VmRSS now, VmHWM at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kilobytes) * 1024


@click.command()
@model_option
@cut_option
@click.option(
    "--stash-memory", "stash", default="256MiB", show_default=True, metavar="SIZE", help="Stash limit of the daemons."
)
@click.option("--threads", default=2, show_default=True, help="CPU threads of the daemons.")
@click.option(
    "--only", multiple=True, type=click.Choice([case.name for case in CASES]), help="A case to run; default: all."
)
@out_option
def main(model: str, cut: str, stash: str, threads: int, only: tuple[str, ...], out: Path) -> None:
    """Measure each case, print a table, write it."""
    out.mkdir(parents=True, exist_ok=True)
    report = Report("budget", f"Growth of a daemon, {model}, cut {cut}, --stash-memory {stash}", out)
    for case in CASES:
        if only and case.name not in only:
            continue
        serving = ("--model", model, "--cut", cut, "--threads", str(threads), "--stash-memory", stash)
        with trunk_daemon(*serving, log=out / "budget.log") as daemon:
            pid = daemon["pid"]
            start = status_bytes(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
            with TrunkClient(daemon["endpoint"], request_timeout_seconds=TIMEOUT_SECONDS) as trunk:
                welcome = trunk.connect()
                activations = torch.randn(case.rows, case.tokens, welcome.model.hidden_size)
                held = [trunk.forward(activations, keep=True, **case.beside()) for _ in range(case.steps)]
                counted, grown = trunk.status().held_bytes, status_bytes(pid, "VmRSS") - start
                trunk.backward(held[-1], torch.ones_like(activations))
                peak = status_bytes(pid, "VmHWM") - start
            time.sleep(IDLE_SECONDS)
            stays = status_bytes(pid, "VmRSS") - start
        report.add(
            case=case.name,
            budget_mib=parse_size(stash) / MIB,
            counted_mib=counted / MIB,
            resident_mib=grown / MIB,
            peak_mib=peak / MIB,
            stays_mib=stays / MIB,
        )
    report.publish()


if __name__ == "__main__":
    main()
