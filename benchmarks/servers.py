"""Start and stop server processes of the benchmarks, and read their ready line of JSON."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 180
STOP_SECONDS = 30
TRUNKD = [sys.executable, "-c", "from zsl.cli.trunkd import trunkd; trunkd(prog_name='zsl-trunkd')"]


@contextmanager
def server_process(script: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Run `benchmarks/<script>` in its own process; yield the content of its first line, and its `pid`.

    Raises `TimeoutError` if it says nothing, `RuntimeError` if it ends instead.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    with _serving(subprocess.Popen(command, stdout=subprocess.PIPE), script) as ready:
        yield ready


@contextmanager
def trunk_daemon(*arguments: str, log: Path = Path(os.devnull)) -> Iterator[dict[str, Any]]:
    """Runs a `zsl-trunkd` on a free port, its log written to a file; gives its ready line, and raises the same."""
    command = [*TRUNKD, "--port", "0", "--log-format", "json", *arguments]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    with _serving(process, f"zsl-trunkd (log: {log})") as ready:
        yield ready


@contextmanager
def _serving(process: subprocess.Popen[bytes], name: str) -> Iterator[dict[str, Any]]:
    try:
        yield {**read_line(process, name, START_SECONDS), "pid": process.pid}
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_line(process: subprocess.Popen[bytes], name: str, seconds: float) -> dict[str, Any]:
    """The next line of JSON that a process prints; it must not print two before it is asked for one.

    Raises `TimeoutError` if it says nothing, `RuntimeError` if it ends instead.
    """
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            raise TimeoutError(f"{name} said nothing for {seconds:g} s")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{name} ended before it had answered; what it wrote says why")
    content: dict[str, Any] = json.loads(line)
    return content
