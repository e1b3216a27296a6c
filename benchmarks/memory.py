"""Compare the memory of clients that train at once with that of as many local runs of the whole model.

    python benchmarks/memory.py                        8 clients, SmolLM2-135M-Instruct, 2 x 128 tokens
    python benchmarks/memory.py --clients 1
    python benchmarks/memory.py --stash-memory 64MiB   a daemon that keeps little, and recomputes forwards

All processes of an arrangement, the daemon too, are looked at every 50 ms while the clients take their steps; what
counts is the largest sum of their proportional set sizes (PSS, Linux only), above what as many bare processes hold
that have imported torch, transformers and peft. One arrangement runs after the other. To look stops the processes for
much of the time, so the steps take longer than they do by themselves.

A checkpoint in the dtype of the run is not copied into memory but mapped: its pages are shared by all processes that
map the file, and count once. That holds for the local runs as for daemon and clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
from clients import Clients
from memory_use import MIB, PeakPss, pss_bytes
from options import cut_option, model_option, size_option
from report import Report, out_option
from servers import trunk_daemon
from sizes import Size
from turns import Through, Turn, Window

LOOK_EVERY_SECONDS = 0.05
STEPS = 4  # of the slowest client, at their length without sampling
MOST_OVER_LOCAL = 0.45  # the aim
BY_DEFAULT = "default"


@dataclass(frozen=True)
class Arrangement:
    """The processes of one way to train, at their peak. The daemon, if there is one, is the first of them."""

    name: str
    bare_pss: int  # of as many bare processes
    pss: list[int]
    windows: list[Window]

    @property
    def above_bare(self) -> int:
        return sum(self.pss) - self.bare_pss


def bare_sums(number: int, threads: int) -> tuple[int, int]:
    """The bytes of `number` bare processes together, and of one more."""
    with Clients(threads=threads) as clients:
        sums = []
        for wanted in (number, number + 1):
            clients.grow_to(wanted)
            sums.append(sum(map(pss_bytes, clients.pids)))
    return sums[0], sums[1]


def measure(turn: Turn, number: int, threads: int, daemons: list[int]) -> tuple[list[int], list[Window]]:
    """The PSS of daemon and clients at the peak, and what each client did."""
    with Clients(threads=threads) as clients:
        clients.grow_to(number)
        longest_step_seconds = clients.prepare(turn)
        with PeakPss(daemons + clients.pids, every_seconds=LOOK_EVERY_SECONDS) as memory:
            windows = clients.measure(STEPS * longest_step_seconds)
    return memory.by_process, windows


def add_row(report: Report, arrangement: Arrangement, clients: int, local: Arrangement) -> None:
    """Add one row to the table."""
    daemon, own = sum(arrangement.pss[:-clients]), sum(arrangement.pss[-clients:])
    report.add(
        arrangement=arrangement.name,
        processes=len(arrangement.pss),
        daemon_mib=daemon / MIB,
        clients_mib=own / MIB,
        peak_mib=sum(arrangement.pss) / MIB,
        bare_mib=arrangement.bare_pss / MIB,
        bare_process_mib=arrangement.bare_pss / len(arrangement.pss) / MIB,
        above_bare_mib=arrangement.above_bare / MIB,
        over_local=arrangement.above_bare / local.above_bare,
        steps=sum(window.steps for window in arrangement.windows),
    )


@click.command()
@model_option
@cut_option
@click.option("--clients", "number", default=8, show_default=True, help="Number of clients that train at once.")
@size_option("a client's batch")
@click.option("--threads", default=2, show_default=True, help="CPU threads of the daemon.")
@click.option("--client-threads", default=1, show_default=True, help="CPU threads of each client.")
@click.option(
    "--stash-memory",
    "stashes",
    multiple=True,
    default=(BY_DEFAULT, "4GiB", "64MiB"),
    show_default=True,
    metavar="SIZE",
    help=f"Stash limit of the daemon, {BY_DEFAULT}: its own choice; repeat it for one daemon each.",
)
@out_option
def main(
    model: str,
    cut: str,
    number: int,
    size: Size,
    threads: int,
    client_threads: int,
    stashes: tuple[str, ...],
    out: Path,
) -> None:
    """Measure all arrangements, print a table, write it."""
    out.mkdir(parents=True, exist_ok=True)

    def turn(endpoint: str | None) -> Turn:
        through: Through = "local" if endpoint is None else "zsl"
        return Turn("whole", through, endpoint, model, cut, size.rows, size.tokens)

    bare, bare_and_one = bare_sums(number, client_threads)
    local = Arrangement("local", bare, *measure(turn(None), number, client_threads, []))
    serving = ("--model", model, "--cut", cut, "--threads", str(threads))
    split = []
    for stash in stashes:
        limit = () if stash == BY_DEFAULT else ("--stash-memory", stash)
        with trunk_daemon(*serving, *limit, log=out / "memory.log") as daemon:
            measured = measure(turn(daemon["endpoint"]), number, client_threads, [daemon["pid"]])
        split.append(Arrangement(f"daemon, stash {stash}, + clients", bare_and_one, *measured))
    description = f"Memory of {number} clients, {model}, cut {cut}, fp32, {size.rows} x {size.tokens} tokens"
    report = Report("memory", description, out)
    for arrangement in (local, *split):
        add_row(report, arrangement, number, local)
    for arrangement in split:
        ratio = arrangement.above_bare / local.above_bare
        met = "met" if ratio <= MOST_OVER_LOCAL else "missed"
        report.note(
            f"{arrangement.name}, over local runs, above bare: {ratio:.2f}, wanted at most {MOST_OVER_LOCAL}: {met}"
        )
    report.publish()


if __name__ == "__main__":
    main()
