"""Measure the cost of idle sessions: the daemon's memory per session, and the latency of active clients.

    python benchmarks/connections.py                                                     1000 idle, 20 active
    python benchmarks/connections.py --idle 50 --active 2 --seconds 1 --rounds 2         a short run

A daemon without a model, in a process of its own. An idle session has two connections and pings when it is due, like
any idle client (`connections_client.py`). First, before anyone works: the daemon's resident memory, open files
and CPU time with the idle sessions, and without. Then clients send small forwards, each the next one when it has its
answer, and the idle sessions come and go between the measurements: a round measures each payload with and without
them, the next round in the other order. A ratio is that of neighbouring measurements, the median over the rounds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click
import psutil
from echo_trunk import HIDDEN
from memory_use import MIB
from report import Report, median, out_option, percentile
from servers import STOP_SECONDS, read_line, server_process

from zsl.transport.listening import raise_file_limit
from zsl.trunk.settings import ServerSettings

SCRIPT = Path(__file__).parent / "connections_client.py"
PAYLOADS = {"2 kB": 1, "64 kB": 32}  # tokens
ACTIVE_PROCESSES = 4  # at most; in one, the clients would wait for each other
WARM_UP_SESSIONS = 50  # so that what the daemon makes for the first ones is not counted
TIMES = 10  # the idle sessions come before memory is looked at a second time: what is freed in between is used again
WATCH_PINGS = 3  # each idle session pings so often while the daemon is watched
ANSWER_SECONDS = 120.0
GONE_SECONDS = 30.0  # until the daemon has closed the connections of those that left
FILES_PER_IDLE = 4  # in the process of the idle sessions: for each socket of ZeroMQ its own, and its connection's
SPARE_FILES = 200


class ClientProcess:
    """A process of `connections_client.py`. It ends with the `with`."""

    def __init__(self, *arguments: str) -> None:
        self._name = " ".join(arguments)
        command = [sys.executable, str(SCRIPT), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, **content: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(content).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        return read_line(self._process, self._name, seconds)

    def ask(self, **content: Any) -> dict[str, Any]:
        self.say(**content)
        return self.hear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Use:
    """Resources of the daemon. `cpu_percent`: of one core."""

    resident_mib: float
    descriptors: int
    cpu_percent: float


class Idle:
    """Idle sessions of the requested number, and their daemon."""

    def __init__(self, sessions: ClientProcess, daemon_pid: int) -> None:
        self.slowest_opening_seconds = 0.0
        self.missed_pings = 0
        self._sessions = sessions
        self._daemon = psutil.Process(daemon_pid)
        self._count = 0
        self._ping_seconds = ServerSettings().ping_seconds

    def change_to(self, count: int) -> None:
        """Open or close idle sessions, and wait until the daemon knows and each has pinged.

        Raises `TimeoutError` if the daemon keeps connections of sessions that are closed.
        """
        if count == self._count:
            return
        connections = 2 * (count - self._count)
        wanted = self._daemon.num_fds() + connections
        answer = self._sessions.ask(sessions=count)
        self.missed_pings = answer["missed_pings"]
        if count > self._count:
            self.slowest_opening_seconds = max(self.slowest_opening_seconds, answer["seconds"])
        self._count = count
        give_up = time.monotonic() + GONE_SECONDS
        while self._daemon.num_fds() != wanted:
            if time.monotonic() > give_up:
                raise TimeoutError(f"the daemon has {self._daemon.num_fds()} open files where {wanted} are due")
            time.sleep(0.05)
        if count:
            time.sleep(self._ping_seconds)

    def use(self) -> Use:
        """Measure the daemon's resources during the given time."""
        began, cpu = time.monotonic(), self._cpu_seconds()
        time.sleep(WATCH_PINGS * self._ping_seconds)
        percent = 100 * (self._cpu_seconds() - cpu) / (time.monotonic() - began)
        return Use(self._daemon.memory_info().rss / MIB, self._daemon.num_fds(), percent)

    def _cpu_seconds(self) -> float:
        times = self._daemon.cpu_times()
        return float(times.user + times.system)


def cost_of_idling(idle: Idle, count: int) -> tuple[Use, Use, Use]:
    """Measure the daemon without idle sessions, with the first group, and with the last of several groups."""
    idle.change_to(WARM_UP_SESSIONS)
    idle.change_to(0)
    none = idle.use()
    idle.change_to(count)
    first = idle.use()
    for _ in range(TIMES - 1):
        idle.change_to(0)
        idle.change_to(count)
    last = idle.use()
    idle.change_to(0)
    return none, first, last


def start_active(stack: ExitStack, endpoint: str, count: int) -> list[ClientProcess]:
    """Start processes with the given number of connected active clients in all."""
    processes = min(count, ACTIVE_PROCESSES)
    shares = [count // processes + (number < count % processes) for number in range(processes)]
    started = [stack.enter_context(ClientProcess("active", endpoint, str(share))) for share in shares]
    for process in started:
        process.hear()
    return started


def latencies(active: Sequence[ClientProcess], tokens: int, seconds: float) -> list[float]:
    """Return the seconds of each forward that all active clients sent in this time."""
    for process in active:
        process.say(tokens=tokens, seconds=seconds)
    return [taken for process in active for taken in process.hear(seconds + ANSWER_SECONDS)["seconds"]]


Rounds = list[list[float]]  # the latencies of each round


def measure(
    idle: Idle, count: int, active: Sequence[ClientProcess], seconds: float, rounds: int
) -> dict[tuple[str, int], Rounds]:
    """By payload and number of idle sessions."""
    taken: dict[tuple[str, int], Rounds] = {(payload, there): [] for payload in PAYLOADS for there in (0, count)}
    order = [0, count]
    for _ in range(rounds):
        for there in order:
            idle.change_to(there)
            for payload, tokens in PAYLOADS.items():
                taken[payload, there].append(latencies(active, tokens, seconds))
        order.reverse()
    return taken


def summary(own: Rounds, without: Rounds, seconds: float) -> dict[str, Any]:
    """The numbers of one payload; `without`: the same rounds without idle sessions, if these are with."""
    forwards = [taken for one in own for taken in one]
    medians, p99s = [median(one) for one in own], [percentile(one, 99) for one in own]
    row = {
        "forwards_per_second": median([len(one) / seconds for one in own]),
        "median_ms": median(forwards) * 1e3,
        "p99_ms": percentile(forwards, 99) * 1e3,
        "p99_ms_of_rounds": (min(p99s) * 1e3, max(p99s) * 1e3),
    }
    if without:
        over = [one / median(other) for one, other in zip(medians, without, strict=True)]
        p99_over = [one / percentile(other, 99) for one, other in zip(p99s, without, strict=True)]
        row |= {
            "median_over_none": median(over),
            "p99_over_none": median(p99_over),
            "p99_over_none_of_rounds": (min(p99_over), max(p99_over)),
        }
    return row


def kb_each(without: Use, use: Use, count: int) -> float:
    """The daemon's memory for each of the idle sessions."""
    return (use.resident_mib - without.resident_mib) * MIB / 1000 / count


def check_limits(idle: int, active: int) -> None:
    """Raises `click.UsageError` for more than the daemon takes or this machine has files for."""
    most = ServerSettings().max_sessions
    if idle + active > most:
        raise click.UsageError(f"{idle} and {active} sessions are more than the {most} that a daemon takes")
    raise_file_limit()  # the processes that are started inherit it
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FILES_PER_IDLE * idle + SPARE_FILES:
        raise click.UsageError(f"{idle} idle sessions need more open files than the {files} of this shell: `ulimit -n`")


@click.command()
@click.option("--idle", "idle_count", type=click.IntRange(1), default=1000, show_default=True, help="Idle sessions.")
@click.option("--active", "active_count", type=click.IntRange(1), default=20, show_default=True, help="Active clients.")
@click.option("--seconds", default=5.0, show_default=True, help="Duration of one measurement.")
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True, help="Rounds of each payload.")
@out_option
def main(idle_count: int, active_count: int, seconds: float, rounds: int, out: Path) -> None:
    """Measure, print one table, write it and a plot."""
    check_limits(idle_count, active_count)
    report = Report(
        "connections",
        f"Forwards of {active_count} clients at a daemon without a model, with {idle_count} idle sessions beside them "
        f"and without (activations of {HIDDEN} values a token, loopback TCP)",
        out,
    )
    with ExitStack() as stack:
        daemon = stack.enter_context(server_process("echo_trunk.py"))
        endpoint = f"tcp://127.0.0.1:{daemon['port']}"
        sessions = stack.enter_context(ClientProcess("idle", endpoint))
        sessions.hear()
        idle = Idle(sessions, daemon["pid"])
        none, first, last = cost_of_idling(idle, idle_count)
        active = start_active(stack, endpoint, active_count)
        taken = measure(idle, idle_count, active, seconds, rounds)
        idle.change_to(0)
    for payload in PAYLOADS:
        for there, use in ((0, none), (idle_count, first)):
            without = taken[payload, 0] if there else []
            report.add(
                payload=payload,
                idle=there,
                **summary(taken[payload, there], without, seconds),
                daemon_mib=use.resident_mib,
                daemon_files=use.descriptors,
                daemon_cpu_percent=use.cpu_percent,
            )
    files = (first.descriptors - none.descriptors) / idle_count
    report.note("daemon_…: what it used before the clients at work came")
    report.note(
        f"an idle session: {kb_each(none, first, idle_count):.1f} kB of the daemon's resident memory and "
        f"{files:g} open files (the kernel's buffers are not counted); "
        f"{idle_count} of them: {first.cpu_percent:.1f} % of a core, {none.cpu_percent:.1f} % without"
    )
    report.note(
        f"when {idle_count} had come and gone {TIMES - 1} times, and were there again: "
        f"{kb_each(none, last, idle_count):.1f} kB each, {last.descriptors} open files in all"
    )
    report.note(
        f"to open them took up to {idle.slowest_opening_seconds:.1f} s; "
        f"{idle.missed_pings} of their pings had no answer when the next was due"
    )
    report.publish()
    report.plot_bars("payload", "p99_ms", "idle", x_label="payload (each way)", y_label="99th percentile (ms)")


if __name__ == "__main__":
    main()
