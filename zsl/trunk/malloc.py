"""Keep freed memory for the next pass, and give it back when there is none.

A pass allocates and frees some hundreds of megabytes in blocks of about one. By default glibc gives such blocks back
to the system as soon as they are free, from a thread other than the main one above all, and the next pass pays for
every page again. What is kept so would stay for ever: blocks that are still held lie between free ones, and glibc gives
back by itself only what is free at the end.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# From malloc.h. What `mallopt` takes: the largest threshold that glibc allows, and how much may stay free.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_MMAP_THRESHOLD_BYTES = 32 << 20
KEPT_BYTES = 1 << 30
IDLE_SECONDS = 10.0


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to `KEPT_BYTES` of freed memory, for all threads in one arena.

    To be called before threads are started. False where there is no glibc; nothing is changed then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {
        M_MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD_BYTES,
        M_TRIM_THRESHOLD: KEPT_BYTES,
        M_ARENA_MAX: 1,
    }
    results = [mallopt(option, value) for option, value in wanted.items()]  # all of them, whatever one says
    return all(results)


def resident_bytes() -> int:
    """The memory of this process that is in RAM; 0 where Linux's /proc is missing."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back_freed_memory() -> bool:
    """Give all freed pages back to the system, wherever they lie. It may take a tenth of a second for each GB.

    False where there is no glibc, or nothing was freed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


class GiveBack:
    """Decides when freed memory is to be given back. Pure: the clock and the sizes come from outside."""

    def __init__(self, resident_at_start: int, budget_bytes: int) -> None:
        """`budget_bytes`: what the process may grow by; what is held is part of it."""
        self._resident_at_start = resident_at_start
        self._budget_bytes = budget_bytes
        self._freed_at: float | None = None  # None: nothing since it was last given back
        self._next_look = 0.0

    def freed(self, now: float) -> None:
        """Note that memory was freed: a pass has ended, or a session."""
        self._freed_at = now

    def is_due(self, now: float, *, busy: bool, held_bytes: int, resident_bytes: int) -> bool:
        """Say if it is time: nothing was freed for `IDLE_SECONDS`, or far more is kept than is held or may be."""
        if self._freed_at is None or now < self._next_look:
            return False
        if busy or now - self._freed_at < IDLE_SECONDS:
            if resident_bytes - self._resident_at_start <= min(held_bytes + KEPT_BYTES, self._budget_bytes):
                return False
        else:
            self._freed_at = None
        self._next_look = now + IDLE_SECONDS
        return True
