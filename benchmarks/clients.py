"""Start client processes of a benchmark and run turns with them (`turns.py` has the messages).

The processes stay from turn to turn, because importing torch takes seconds in each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from servers import STOP_SECONDS, read_line
from turns import Turn, Window

# For the slowest: many processes on few cores import torch, or take their last step.
ANSWER_SECONDS = 600
SCRIPT = Path(__file__).parent / "throughput_client.py"


class Clients:
    """Processes of `throughput_client.py`, all of which take part in each turn. They end with the `with`."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def grow_to(self, count: int) -> list[int]:
        """Start as many as are missing, and wait until each has imported torch; their process ids."""
        command = [sys.executable, str(SCRIPT), "--threads", str(self._threads), "--seed"]
        fresh = range(len(self._processes), count)
        for seed in fresh:
            process = subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
        for index in fresh:
            self._answer(index, ANSWER_SECONDS)
        return [self._processes[index].pid for index in fresh]

    def prepare(self, turn: Turn) -> float:
        """Have all build what they need, and warm up; the seconds of their longest step."""
        self._say(asdict(turn))
        return max(float(self._answer(index, ANSWER_SECONDS)["step_seconds"]) for index in range(len(self._processes)))

    def measure(self, seconds: float) -> list[Window]:
        """Have all begin at once; return the work of each in the given seconds."""
        self._say({"seconds": seconds})
        return [Window(**self._answer(i, seconds + ANSWER_SECONDS)) for i in range(len(self._processes))]

    def _say(self, content: dict[str, Any]) -> None:
        line = json.dumps(content).encode() + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    def _answer(self, index: int, seconds: float) -> dict[str, Any]:
        return read_line(self._processes[index], f"client {index}", seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
