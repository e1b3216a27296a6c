"""Run many clients for a long time through faulty connections, with clients and daemons being killed.

    python benchmarks/soak.py --minutes 20            50 clients, a tiny Llama, two daemons
    python benchmarks/soak.py --minutes 1 --clients 10

Each client has lines of its own: to the first daemon, and every second client also to the other. All the time, lines
are cut, reset, half closed, blackholed, delayed, throttled, and their bits are flipped; clients and the first daemon
are killed with SIGKILL; the second daemon lives through it all, and is stopped (SIGSTOP) now and then. The daemons run
with --deterministic packed, so every gradient must be that of a run without faults, bit for bit; before the faults
begin, that run is made. It must also be that of the whole local model, but for rounding, whatever the batches bring
along: padding in front or behind, holes, positions that start again. What is counted at the end: steps, replays, typed
errors, wrong gradients (must be 0), hangs (must be 0), and what the second daemon holds when all clients have gone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the faulty line, the history and the tiny model are those of the tests

from report import Report, out_option, percentile
from soak_client import STEPS, Task, train_rounds

import zsl
from support.daemon import Daemon
from support.faulty_link import FaultyLink, Way
from support.forks import forks
from support.history import History, check
from support.models import CUT, write_checkpoint

FAMILY = "llama"
TRAJECTORIES = 5
REQUEST_TIMEOUT_SECONDS = 60.0
HANG_SECONDS = 90.0  # without a word of a client whose requests end in 60 s
START_SECONDS = 300.0
WARM_UP_SECONDS = 30.0  # before memory is first looked at
# How far a gradient may be from the whole local model's, of its largest value. After some steps on random tokens many
# are what is left of larger terms, so that rounding weighs more than at the beginning.
LOCAL_TOLERANCE = 1e-3
THROTTLED_EVERY = 5  # so many lines are slow all the time
# Mean seconds from one to the next.
LINE_FAULT_SECONDS, CLIENT_KILL_SECONDS, DAEMON_KILL_SECONDS, DAEMON_STOP_SECONDS = 0.3, 5.0, 30.0, 120.0
LINE_FAULT_LASTS_SECONDS = 3.0
STOPPED_SECONDS = 15.0
LEAST_ANSWER_BYTES, MOST_ANSWER_BYTES = 1, 30_000  # until a line breaks


class Faults:
    """Random schedule of faults."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._due: list[tuple[float, float, Callable[[], None]]] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        self.counts: Counter[str] = Counter()

    def every(self, mean_seconds: float, act: Callable[[], None]) -> None:
        """A Poisson process."""
        self._due.append((self._after(mean_seconds), mean_seconds, act))

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, act))

    def turn(self) -> None:
        """Apply the faults that are due, and undo those whose time is over."""
        now = time.monotonic()
        for place, (when, mean_seconds, act) in enumerate(self._due):
            if now >= when:
                self._due[place] = (self._after(mean_seconds), mean_seconds, act)
                act()
        ready = [act for when, act in self._later if now >= when]
        self._later = [(when, act) for when, act in self._later if now < when]
        for act in ready:
            act()

    def finish(self) -> None:
        """Undo all temporary faults now."""
        for _, act in self._later:
            act()
        self._later.clear()

    def _after(self, mean_seconds: float) -> float:
        return time.monotonic() + self._chance.expovariate(1 / mean_seconds)


class Client:
    """A client's process, started again whenever it was killed."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.start()

    def start(self) -> None:
        self.process = forks("soak_client").Process(target=train_rounds, args=(self.task,), daemon=True)
        self.process.start()
        self.started = time.monotonic()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)

    @property
    def silent_seconds(self) -> float:
        """Return the seconds since its last record, or its start."""
        files = self.task.directory.glob(f"{self.task.name}-*.history")
        newest = max((file.stat().st_mtime for file in files), default=0.0)
        return min(time.time() - newest, time.monotonic() - self.started)


def oracle_of(model: str, endpoint: str, directory: Path, seed: int) -> dict[int, History]:
    """Each trajectory without faults."""
    processes = [
        forks("soak_client").Process(
            target=train_rounds,
            args=(Task("oracle", trajectory, seed, model, endpoint, directory, REQUEST_TIMEOUT_SECONDS, rounds=1),),
        )
        for trajectory in range(TRAJECTORIES)
    ]
    for process in processes:
        process.start()
    histories = {}
    for trajectory, process in enumerate(processes):
        process.join(START_SECONDS)
        assert process.exitcode == 0, "the run without faults failed"
        (file,) = directory.glob(f"oracle-{process.pid}-0.history")
        histories[trajectory] = History.read(file)
    return histories


def line_fault(link: FaultyLink, chance: random.Random) -> str:
    """Set one fault of a link and return its name."""
    way: Way = chance.choice(["up", "down", "both"])
    after = chance.randint(LEAST_ANSWER_BYTES, MOST_ANSWER_BYTES)
    name = chance.choice(["cut", "reset", "half_close", "flip_bits", "blackhole", "delay", "throttle"])
    if name == "blackhole":
        link.blackhole(way)
    elif name == "delay":
        link.delay(way, 0.1, jitter_seconds=0.2)
    elif name == "throttle":
        link.throttle(way, 20_000)
    else:
        getattr(link, name)(way, after_bytes=after)
    return name


def heal(link: FaultyLink, slow: bool) -> None:
    link.heal()
    if slow:
        link.throttle("both", 50_000)
        link.delay("both", 0.05)


def process_facts(pid: int) -> dict[str, float]:
    """Resident MB, file descriptors and threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) / 1000,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def judge(
    directory: Path, clients: list[Client], oracle: dict[int, History]
) -> tuple[Counter[str], list[str], list[float]]:
    """Results of all clients' records: counts, violations, and the seconds of each step.

    The run without faults is theirs too, as far as the local model goes.
    """
    counts: Counter[str] = Counter()
    violations: list[str] = []
    seconds: list[float] = []
    for client in clients:
        for file in directory.glob(f"{client.task.name}-*.history"):
            history = History.read(file)
            counts["rounds"] += 1
            counts["steps"] += sum(event.kind == "gradient" for event in history.events)
            counts["whole rounds"] += sum(event.kind == "gradient" for event in history.events) == STEPS
            for event in history.events:
                counts[f"error {event.what}"] += event.kind == "error"
            name = f"trajectory {client.task.trajectory}"
            found = check(history, oracle[client.task.trajectory], killed=[name])
            violations += [f"{file.name}: {what}" for what in found]
    for file in directory.glob("*.steps"):
        for line in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the last one of a process that was killed
                step = json.loads(line)
                counts["replays"] += step.get("replays", 0)
                counts["shared"] += step.get("shared", 0)
                counts[f"form {step.get('form')}"] += "form" in step
                seconds.append(step["seconds"])
                if not step.get("difference", 0.0) <= LOCAL_TOLERANCE:  # nor NaN
                    violations.append(f"{file.name}: {step['form']} is off by {step['difference']:.2g}, against local")
    return counts, violations, seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@click.command()
@click.option("--minutes", default=20.0, show_default=True, help="Duration of the run.")
@click.option("--clients", "number", default=50, show_default=True, help="Number of clients.")
@click.option("--seed", default=0, show_default=True, help="Random seed of faults and data.")
@out_option
def main(minutes: float, number: int, seed: int, out: Path) -> None:
    """Run, print one table, and exit with 1 if a gradient was wrong or a client hung."""
    chance = random.Random(seed)
    report = Report("soak", f"{number} clients, {minutes:g} minutes of faults, seed {seed}", out)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = str(write_checkpoint(directory, FAMILY))
        options = ["--model", model, "--cut", CUT, "--threads", "1", "--deterministic", "packed"]
        options += ["--max-batch-tokens", "128", "--merge-below-tokens", "64"]
        port = free_port()
        victim = Daemon(*options, log=directory / "victim.log", port=port)
        stack.enter_context(victim)
        survivor = stack.enter_context(Daemon(*options, log=directory / "survivor.log"))
        oracle = oracle_of(model, survivor.endpoint, directory, seed)
        links: list[FaultyLink] = []
        clients: list[Client] = []
        for n in range(number):
            own = [
                stack.enter_context(FaultyLink(target, seed=seed + n))
                for target in ([port] if n % 2 else [port, survivor.port])
            ]
            for link in own:
                heal(link, n % THROTTLED_EVERY == 0)
            links += own
            endpoint = ",".join(link.endpoint for link in own)
            clients.append(
                Client(Task(f"client{n}", n % TRAJECTORIES, seed, model, endpoint, directory, REQUEST_TIMEOUT_SECONDS))
            )
        until = time.monotonic() + START_SECONDS
        while not all(any(directory.glob(f"{client.task.name}-*.steps")) for client in clients):
            assert time.monotonic() < until, "the clients did not start"
            time.sleep(0.5)
        faults, hangs, errors = Faults(chance), 0, 0

        def break_line() -> None:
            n = chance.randrange(len(links))
            faults.counts[f"line {line_fault(links[n], chance)}"] += 1
            faults.later(LINE_FAULT_LASTS_SECONDS, lambda: heal(links[n], n % THROTTLED_EVERY == 0))

        def kill_client() -> None:
            client = chance.choice(clients)
            client.kill()
            client.start()
            faults.counts["client killed"] += 1

        def kill_daemon() -> None:
            victim.kill()
            victim.process.stdout.close()  # type: ignore[union-attr]
            victim.start()
            faults.counts["daemon killed"] += 1

        def stop_daemon() -> None:
            survivor.signal(signal.SIGSTOP)
            faults.counts["daemon stopped"] += 1
            faults.later(STOPPED_SECONDS, lambda: survivor.signal(signal.SIGCONT))

        faults.every(LINE_FAULT_SECONDS, break_line)
        faults.every(CLIENT_KILL_SECONDS, kill_client)
        faults.every(DAEMON_KILL_SECONDS, kill_daemon)
        faults.every(DAEMON_STOP_SECONDS, stop_daemon)
        began = time.monotonic()
        at_start: dict[str, float] | None = None
        while time.monotonic() - began < minutes * 60:
            faults.turn()
            for client in clients:
                if client.process.exitcode is not None:
                    errors += 1
                    client.start()
                elif client.silent_seconds > HANG_SECONDS:
                    hangs += 1
                    client.kill()
                    client.start()
            if at_start is None and time.monotonic() - began > min(WARM_UP_SECONDS, minutes * 15):
                at_start = process_facts(survivor.process.pid)
            time.sleep(0.05)
        faults.finish()
        for client in clients:
            client.kill()
        at_end = process_facts(survivor.process.pid)
        with zsl.TrunkClient(survivor.endpoint) as observer:
            deadline = time.monotonic() + 120  # a lease is shorter
            while (left := observer.status()).sessions > 1 and time.monotonic() < deadline:
                time.sleep(0.5)
        counts, violations, seconds = judge(directory, clients, oracle)
    assert at_start is not None
    rows: dict[str, object] = {
        "steps done": counts["steps"],
        "rounds, of which whole": f"{counts['rounds']}, {counts['whole rounds']}",
        "step, median and 99th percentile": f"{percentile(seconds, 50):.2f} s, {percentile(seconds, 99):.2f} s",
        "longest step": f"{max(seconds):.1f} s",
        "requests replayed": counts["replays"],
        "requests that shared a pass": counts["shared"],
        **{
            f"  steps, {name.removeprefix('form ')}": n
            for name, n in sorted(counts.items())
            if name.startswith("form ") and n
        },
        "typed errors": sum(n for name, n in counts.items() if name.startswith("error ")),
        **{f"  {name.removeprefix('error ')}": n for name, n in counts.items() if name.startswith("error ") and n},
        "clients that ended by themselves": errors,
        "WRONG GRADIENTS": len(violations),
        "HANGS": hangs,
        **dict(sorted(faults.counts.items())),
        **{
            f"second daemon, {name.replace('_', ' ')}, start and end": f"{at_start[name]:.0f}, {at_end[name]:.0f}"
            for name in at_end
        },
        "second daemon, sessions and held bytes after all have gone": f"{left.sessions - 1}, {left.held_bytes}",
    }
    for what, how_much in rows.items():
        report.add(what=what, number=str(how_much))
    for violation in violations[:10]:
        report.note(violation)
    report.publish()
    sys.exit(1 if violations or hangs else 0)


if __name__ == "__main__":
    main()
