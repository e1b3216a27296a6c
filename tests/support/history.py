"""A history of what clients did, and what is wrong with it.

Each client tells what it does: a step begins, its micro-batches come back, one gradient is used, or a typed error ends
the step. `check` compares that with the history of a run without faults, the oracle. The promise is that a step ends
with the gradient of that run, or with an error. A history can be kept in a file, an event a line; a process that is
killed leaves all of it but the line that it was writing. This module knows neither zsl nor torch: a gradient is its
digest.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

Kind = Literal["begin", "micro_batch", "gradient", "error"]


@dataclass(frozen=True)
class Event:
    client: str
    step: int
    kind: Kind
    what: str = ""  # the micro-batch, the gradient's digest, or the error's name


def digest(gradients: Iterable[bytes | bytearray | memoryview]) -> str:
    """Digest of all gradients of a step, in a fixed order. One that is missing is an empty buffer."""
    total = hashlib.sha256()
    for gradient in gradients:
        total.update(memoryview(gradient).nbytes.to_bytes(8))
        total.update(gradient)
    return total.hexdigest()


class History:
    """Events in the order in which they were told, from any thread. With a `file`, each is written before it counts;
    a process that takes a killed one's place takes another file."""

    def __init__(self, file: Path | None = None) -> None:
        self.events: list[Event] = []
        self._file = file.open("ab", buffering=0) if file else None
        self._lock = threading.Lock()

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read the lines of a file. A last line without an end was being written when its process was killed."""
        history = cls()
        *lines, _torn = file.read_bytes().split(b"\n")
        history.events = [Event(**json.loads(line)) for line in lines]
        return history

    def begin(self, client: str, step: int) -> None:
        self._add(Event(client, step, "begin"))

    def micro_batch(self, client: str, step: int, micro_batch: int) -> None:
        self._add(Event(client, step, "micro_batch", str(micro_batch)))

    def gradient(self, client: str, step: int, gradient_digest: str) -> None:
        """The optimizer used this gradient."""
        self._add(Event(client, step, "gradient", gradient_digest))

    def error(self, client: str, step: int, error: Exception) -> None:
        """The step ended without a gradient. The client may begin it again."""
        self._add(Event(client, step, "error", type(error).__name__))

    def close(self) -> None:
        if self._file:
            self._file.close()

    def clients(self) -> set[str]:
        return {event.client for event in self.events}

    def of(self, client: str) -> list[Event]:
        return [event for event in self.events if event.client == client]

    def _add(self, event: Event) -> None:
        with self._lock:
            if self._file:
                self._file.write(json.dumps(asdict(event)).encode() + b"\n")
            self.events.append(event)


def check(history: History, oracle: History, *, killed: Collection[str] = ()) -> list[str]:
    """Everything that is wrong, in words; nothing if the promise was kept.

    A client that was `killed` may leave its last step open and need not have come to later ones.
    """
    strangers = history.clients() - oracle.clients()
    found = [f"{client}: the oracle has no such client" for client in sorted(strangers)]
    for client in sorted(oracle.clients()):
        steps = _steps_of_oracle(client, oracle)
        found += [f"{client}: {what}" for what in _violations(history.of(client), steps, client in killed)]
    return found


@dataclass
class _Step:
    micro_batches: list[str]
    gradient: str = ""


def _steps_of_oracle(client: str, oracle: History) -> dict[int, _Step]:
    steps: dict[int, _Step] = {}
    for event in oracle.of(client):
        if event.kind == "begin" and event.step == len(steps):
            steps[event.step] = _Step([])
        elif event.kind == "micro_batch":
            steps[event.step].micro_batches.append(event.what)
        elif event.kind == "gradient" and not steps[event.step].gradient:
            steps[event.step].gradient = event.what
        else:
            raise ValueError(f"{client}: a run with {event} is no oracle")
    if not all(step.gradient for step in steps.values()):
        raise ValueError(f"{client}: a run that has not ended is no oracle")
    return steps


def _violations(events: list[Event], oracle: dict[int, _Step], killed: bool) -> Iterator[str]:
    open_step: int | None = None
    may_begin = {0}
    micro_batches: list[str] = []
    used: set[int] = set()
    for event in events:
        step = event.step
        if event.kind == "begin":
            if open_step is not None:
                yield f"step {open_step} was neither finished nor ended by an error when step {step} began"
            if step not in may_begin:
                yield f"step {step} began when it was the turn of {sorted(may_begin)}"
            if step not in oracle:
                yield f"step {step} is none of the oracle's"
            open_step, micro_batches, may_begin = step, [], {step + 1}
        elif event.kind == "gradient" and step in used:
            yield f"step {step} used more than one gradient"
        elif step != open_step:
            yield f"step {step} was not open at its {event.kind}"
        elif event.kind == "micro_batch":
            micro_batches.append(event.what)
        elif event.kind == "error":
            open_step, may_begin = None, {step, step + 1}
        else:
            open_step = None
            used.add(step)
            expected = oracle.get(step)
            if expected and event.what != expected.gradient:
                yield f"step {step} used another gradient than the oracle's"
            if expected and sorted(micro_batches) != sorted(expected.micro_batches):
                yield f"step {step} used the micro-batches {micro_batches} instead of {expected.micro_batches}"
    if killed:
        return
    if open_step is not None:
        yield f"step {open_step} was neither finished nor ended by an error"
    elif oracle.keys() & may_begin and not (events and events[-1].kind == "error"):
        yield f"step {max(may_begin)} and what follows is missing"
