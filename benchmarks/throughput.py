"""Measure training steps per second of 1 to 16 client processes through one trunk daemon.

It is compared with a daemon that merges nothing, a trunk over gRPC, and clients that train the whole model locally.

    python benchmarks/throughput.py                                            SmolLM2-135M-Instruct; hours on 2 cores
    python benchmarks/throughput.py --kind trunk --clients 1,4 --sizes 1x12 --seconds 3 --repeats 1
    python benchmarks/throughput.py --kind whole --clients 4 --sizes 2x128 --against local --stash-memory 4GiB

Two kinds of clients, each with its own table. `trunk` only sends activations and gradients: what the daemon can do.
`whole` trains bottom and top with LoRA around the trunk, so that most of the machine may be busy with the clients.

In each cell of the table all variants take turns, round by round, so that what else the machine does hits all alike;
the clients of a round begin together, and the step that its end cuts counts in part. Steps a second are the median
over the rounds, the ratio is the median of each round's. Latencies are those of all clients and rounds. Memory is PSS
(Linux only), the largest that was seen; the clients' bare one is what they hold when they have imported torch,
transformers and peft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import click
from clients import Clients
from memory_use import MIB, PeakPss, pss_bytes
from options import cut_option, model_option
from report import Report, as_table, median, out_option, percentile
from servers import server_process, trunk_daemon
from sizes import Size, parse_size
from turns import Kind, Through, Turn, Window

MERGING_OFF = "merging-off"
WITH_ADAPTERS = "adapters, "
AGAINST = ("local", MERGING_OFF, "grpc")
KINDS: tuple[Kind, ...] = ("trunk", "whole")
LEAST_STEPS = 2  # of the slowest client in a window: in a shorter one, how all begin at once would show
MEMORY_SHARE = 0.02  # of the time, for looking at memory: that stops the processes
MEMORY_LOOKS = 4  # in a window, at most

Value = TypeVar("Value")


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared. `local` has neither endpoint nor daemon, and no `trunk` clients; gRPC has
    no `whole` ones."""

    name: str
    through: Through
    endpoint: str | None = None
    daemon_pid: int | None = None
    adapter_rank: int = 0

    def fits(self, kind: Kind) -> bool:
        if self.adapter_rank:
            return kind == "trunk"
        return self.through == "zsl" or (self.through == "grpc") == (kind == "trunk")


@dataclass(frozen=True)
class Plan:
    """Settings of the measurements of one kind of clients."""

    kind: Kind
    model: str
    cut: str
    counts: Sequence[int]
    sizes: Sequence[Size]
    seconds: float
    repeats: int
    client_threads: int

    def turn(self, variant: Variant, size: Size) -> Turn:
        return Turn(
            kind=self.kind,
            through=variant.through,
            endpoint=variant.endpoint,
            model=self.model,
            cut=self.cut,
            rows=size.rows,
            tokens=size.tokens,
            left_padding=size.left_padding,
            adapter_rank=variant.adapter_rank,
        )


@dataclass(frozen=True)
class Round:
    """Work of all clients of a variant in one turn."""

    windows: list[Window]
    seconds: float
    daemon_bytes: int
    clients_bytes: int

    @property
    def steps_per_second(self) -> float:
        return sum(window.steps for window in self.windows) / self.seconds


def take_round(plan: Plan, variant: Variant, size: Size, clients: Clients) -> Round:
    """One turn of all clients."""
    daemons = [] if variant.daemon_pid is None else [variant.daemon_pid]
    longest_step_seconds = clients.prepare(plan.turn(variant, size))
    seconds = max(plan.seconds, LEAST_STEPS * longest_step_seconds)
    with PeakPss(daemons + clients.pids, every_seconds=seconds / MEMORY_LOOKS, most_share=MEMORY_SHARE) as memory:
        windows = clients.measure(seconds)
    split = len(daemons)
    return Round(windows, seconds, sum(memory.by_process[:split]), sum(memory.by_process[split:]))


def ratios(rounds: Sequence[Round], others: Sequence[Round]) -> list[float]:
    """Steps a second over another variant's, in each round."""
    return [ours.steps_per_second / other.steps_per_second for ours, other in zip(rounds, others, strict=True)]


def comparisons(variant: Variant, cell: dict[str, list[Round]]) -> dict[str, Any]:
    """The ratios of a variant to those that are there to compare it with, by name of the column."""
    baselines = {
        "over_local": "local",
        "over_merging_off": WITH_ADAPTERS + MERGING_OFF if variant.adapter_rank else MERGING_OFF,
        "over_grpc": "grpc",
        "over_zsl": "zsl",
    }
    columns: dict[str, Any] = {}
    for column, name in baselines.items():
        found = ratios(cell[variant.name], cell[name]) if name in cell else []
        columns[column] = median(found) if found else None
        columns[column + "_range"] = (min(found), max(found)) if found else None
    return columns


def summary(rounds: Sequence[Round], size: Size) -> dict[str, Any]:
    """The numbers of a variant in one cell."""
    windows = [window for one in rounds for window in one.windows]
    step, forward, backward, merged = (
        list(chain.from_iterable(lists))
        for lists in zip(
            *((w.step_seconds, w.forward_seconds, w.backward_seconds, w.merged) for w in windows), strict=True
        )
    )
    steps_per_second = median([one.steps_per_second for one in rounds])
    return {
        "steps_per_second": steps_per_second,
        "tokens_per_second": steps_per_second * size.total_tokens,
        "step_p50_ms": median(step) * 1e3,
        "step_p99_ms": percentile(step, 99) * 1e3,
        "forward_p50_ms": median(forward) * 1e3,
        "backward_p50_ms": median(backward) * 1e3,
        "mean_batch": sum(merged) / len(merged) if merged else None,
        "daemon_mib": max(one.daemon_bytes for one in rounds) / MIB,
        "clients_mib": max(one.clients_bytes for one in rounds) / MIB,
        "window_seconds": median([one.seconds for one in rounds]),
    }


def measure(plan: Plan, variants: Sequence[Variant], report: Report) -> None:
    """A row for each variant in each cell."""
    with Clients(threads=plan.client_threads) as clients:
        for number in sorted(set(plan.counts)):  # rising: none idles beside the others, and only fresh ones are bare
            fresh = clients.grow_to(number)
            bare_mib = median([pss_bytes(pid) for pid in fresh]) / MIB * number
            for size in plan.sizes:
                rounds = measure_cell(plan, variants, size, clients)
                rows = [
                    {
                        "variant": variant.name,
                        "kind": plan.kind,
                        "size": size.name,
                        "clients": number,
                        **summary(rounds[variant.name], size),
                        **comparisons(variant, rounds),
                        "clients_bare_mib": bare_mib,
                    }
                    for variant in variants
                ]
                click.echo(as_table(rows) + "\n", err=True)  # the end may be hours away
                for row in rows:
                    report.add(**row)


def measure_cell(plan: Plan, variants: Sequence[Variant], size: Size, clients: Clients) -> dict[str, list[Round]]:
    """The rounds of each variant. Who goes first changes from round to round."""
    rounds: dict[str, list[Round]] = {variant.name: [] for variant in variants}
    order = list(variants)
    for _ in range(plan.repeats):
        for variant in order:
            rounds[variant.name].append(take_round(plan, variant, size, clients))
        order.append(order.pop(0))
    return rounds


def start_variants(
    stack: ExitStack,
    against: Sequence[str],
    stashes: Sequence[str],
    serving: Sequence[str],
    adapter_rank: int,
    out: Path,
) -> tuple[list[Variant], list[str]]:
    """The variants with their servers started, and what is to be noted of the daemons."""
    notes = []

    def daemon(name: str, *arguments: str) -> Variant:
        ready = stack.enter_context(trunk_daemon(*serving, *arguments, log=out / f"throughput-{name}.log"))
        below, most = ready["merge_below_tokens"], ready["max_batch_tokens"]
        notes.append(f"{name}: requests of up to {below} tokens share passes of up to {most}")
        return Variant(name, "zsl", ready["endpoint"], ready["pid"])

    variants = []
    if "local" in against:
        variants.append(Variant("local", "local"))
    if MERGING_OFF in against:
        variants.append(daemon(MERGING_OFF, "--merge-below-tokens", "0"))
    if "grpc" in against:
        ready = stack.enter_context(server_process("baselines/grpc_trunk.py", *serving))
        variants.append(Variant("grpc", "grpc", f"127.0.0.1:{ready['port']}", ready["pid"]))
    variants.append(daemon("zsl"))
    variants += [daemon(f"zsl, stash {stash}", "--stash-memory", stash) for stash in stashes]
    if adapter_rank:
        named = {"zsl": WITH_ADAPTERS + "merging", MERGING_OFF: WITH_ADAPTERS + MERGING_OFF}
        adapted = [
            replace(one, name=named[one.name], adapter_rank=adapter_rank) for one in variants if one.name in named
        ]
        variants += adapted
    return variants, notes


def comma_list(parse: Callable[[str], Value]) -> Callable[..., list[Value]]:
    """For an option: its parts between commas."""

    def parts(_context: click.Context, _option: click.Parameter, text: str) -> list[Value]:
        return [parse(part) for part in text.split(",")] if text else []

    return parts


@click.command()
@model_option
@cut_option
@click.option(
    "--kind",
    "kinds",
    default=",".join(KINDS),
    show_default=True,
    callback=comma_list(click.Choice(KINDS)),
    help="Kind of clients; both run one after the other.",
)
@click.option(
    "--clients",
    "counts",
    default="1,2,4,8,16",
    show_default=True,
    callback=comma_list(click.IntRange(1)),
    help="Numbers of clients.",
)
@click.option(
    "--sizes",
    default="small,medium,large",
    show_default=True,
    callback=comma_list(parse_size),
    help="Request sizes: 1x16, 2x64 and 2x128, or any ROWSxTOKENS; of trunk clients also 1x4+12, 4 padded on the left.",
)
@click.option(
    "--against",
    default=",".join(AGAINST),
    show_default=True,
    callback=comma_list(click.Choice(AGAINST)),
    help="Variants to compare zsl with.",
)
@click.option(
    "--adapter-rank",
    default=0,
    show_default=True,
    help="Add variants of trunk clients with adapters of this rank on all linear layers of the trunk: other weights at "
    "each step, whose gradients come back.",
)
@click.option(
    "--stash-memory",
    "stashes",
    multiple=True,
    metavar="SIZE",
    help="Add a daemon with this stash limit: what the memory that zsl keeps by default costs; repeat it for others.",
)
@click.option("--seconds", default=10.0, show_default=True, help="Duration of one measurement; longer for long steps.")
@click.option("--repeats", default=3, show_default=True, help="Rounds of each cell.")
@click.option("--threads", default=2, show_default=True, help="CPU threads of each daemon.")
@click.option("--client-threads", default=1, show_default=True, help="CPU threads of each client.")
@out_option
def main(
    model: str,
    cut: str,
    kinds: list[Kind],
    counts: list[int],
    sizes: list[Size],
    against: list[str],
    adapter_rank: int,
    stashes: tuple[str, ...],
    seconds: float,
    repeats: int,
    threads: int,
    client_threads: int,
    out: Path,
) -> None:
    """Measure, and for each kind print a table, write it, and plot it."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        serving = ("--model", model, "--cut", cut, "--threads", str(threads))
        variants, notes = start_variants(stack, against, stashes, serving, adapter_rank, out)
        for kind in kinds:
            description = f"Steps a second of {kind} clients, {model}, cut {cut}, fp32, daemons of {threads} threads"
            report = Report(f"throughput-{kind}", description, out)
            plan = Plan(kind, model, cut, counts, sizes, seconds, repeats, client_threads)
            measure(plan, [variant for variant in variants if variant.fits(kind)], report)
            for note in notes:
                report.note(note)
            report.publish()
            for size in sizes:
                report.plot_lines(
                    "clients",
                    "steps_per_second",
                    "variant",
                    x_label="clients",
                    y_label="steps a second of all clients",
                    only=("size", size.name),
                )


if __name__ == "__main__":
    main()
