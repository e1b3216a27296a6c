"""A real `zsl-trunkd` in a process of its own, on a free port, with every wait bounded."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_SECONDS = 90
STOP_SECONDS = 30

COMMAND = [sys.executable, "-c", "from zsl.cli.trunkd import trunkd; trunkd(prog_name='zsl-trunkd')"]


class Daemon:
    """Started by `with`, stopped at its end. `ready` is the ready line's content."""

    def __init__(
        self,
        *arguments: str,
        log: Path,
        port: int = 0,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """`command`: a whole one, in place of `zsl-trunkd` with `arguments`."""
        self._arguments = command or [*COMMAND, "--port", str(port), "--log-format", "json", *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self.log = log

    @property
    def endpoint(self) -> str:
        return str(self.ready["endpoint"])

    def start(self) -> Self:
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                self._arguments, stdout=subprocess.PIPE, stderr=stderr, env=self._environment
            )
        self._read_ready()
        return self

    def _read_ready(self) -> None:
        self.ready: dict[str, Any] = json.loads(self._read_line())
        assert self.ready["event"] == "ready"

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read_line(self) -> bytes:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                self.process.kill()
                raise TimeoutError(f"the daemon was not ready in {START_SECONDS} s: {self.log.read_text()}")
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the daemon ended with {self.wait()}: {self.log.read_text()}")
        return line
