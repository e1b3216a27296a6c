"""Read the proportional set size (PSS) of processes on Linux.

A page that several processes share is divided among them, so that a sum counts it once.

Reading one stops its process: about 25 ms for each GB that is resident.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

MIB = 1 << 20


def pss_bytes(pid: int) -> int:
    """The proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("Pss:"))
    return int(kilobytes) * 1024


class PeakPss:
    """Watches processes inside `with`: `by_process` has the PSS of each at the moment when their sum was largest.

    Looks every `every_seconds`, but so seldom that looking takes at most `most_share` of the time.
    """

    def __init__(self, pids: Sequence[int], *, every_seconds: float, most_share: float = 1.0) -> None:
        self.by_process = [0 for _ in pids]
        self._pids = pids
        self._every_seconds = every_seconds
        self._rest_over_look = 1 / most_share - 1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def total(self) -> int:
        return sum(self.by_process)

    def _watch(self) -> None:
        rest_seconds = self._every_seconds
        while not self._over.wait(rest_seconds):
            began = time.perf_counter()
            try:
                sizes = [pss_bytes(pid) for pid in self._pids]
            except (FileNotFoundError, ProcessLookupError):
                return  # a process has died; the caller that waits for it reports it
            took_seconds = time.perf_counter() - began
            if sum(sizes) > self.total:
                self.by_process = sizes
            rest_seconds = max(self._every_seconds - took_seconds, took_seconds * self._rest_over_look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
