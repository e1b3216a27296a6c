"""A real `zsl serve` in a process of its own, on a free port, with every wait bounded."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from .daemon import Daemon

COMMAND = [sys.executable, "-c", "from zsl.cli.zsl import zsl; zsl(prog_name='zsl')", "serve", "--port", "0"]


class Server(Daemon):
    """Started by `with`, stopped at its end. `address` is what clients take as their base URL."""

    def __init__(self, *arguments: str, log: Path, environment: Mapping[str, str]) -> None:
        super().__init__(log=log, environment=environment, command=[*COMMAND, *arguments])

    def _read_ready(self) -> None:
        found = re.search(rb"http://\S+", self._read_line())
        assert found is not None
        self.address = found[0].decode()
