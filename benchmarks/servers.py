"""Server processes of the benchmarks: start one, read the line of JSON that it prints when it is ready, end it."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 180
STOP_SECONDS = 30


@contextmanager
def server_process(script: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Runs `benchmarks/<script>` in a process of its own, and gives what its first line says.

    Raises `TimeoutError` if it says nothing, `RuntimeError` if it ends instead.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield json.loads(_first_line(process, script))
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_line(process: subprocess.Popen[bytes], script: str) -> bytes:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(START_SECONDS):
            raise TimeoutError(f"{script} did not start within {START_SECONDS} s")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{script} ended before it was ready; what it wrote above says why")
    return line
