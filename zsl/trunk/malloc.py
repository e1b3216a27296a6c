"""Tuning of glibc malloc: keep freed memory for the next pass, return it to the system when idle.

A pass allocates and frees some hundreds of megabytes in blocks of about one. By default glibc returns such blocks to
the system as soon as they are free, above all from threads other than the main one, and the next pass pays for every
page fault again. Memory kept this way would never be returned: blocks in use lie between free ones, and glibc trims
only the end of its heap.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# Options of `mallopt` (malloc.h), and the bytes that may stay free.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
KEPT_BYTES = 1 << 30
IDLE_SECONDS = 10.0


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to `KEPT_BYTES` of freed memory, in one arena for all threads.

    Call it before starting threads. Returns False, and changes nothing, without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {
        M_MMAP_MAX: 0,  # by a threshold, blocks over 32 MB would still be mapped anew each time
        M_TRIM_THRESHOLD: KEPT_BYTES,
        M_ARENA_MAX: 1,
    }
    results = [mallopt(option, value) for option, value in wanted.items()]  # set all options even if one fails
    return all(results)


def resident_bytes() -> int:
    """Return the resident set size of this process; 0 without Linux's /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back_freed_memory() -> bool:
    """Return all freed pages to the system (`malloc_trim`), in about a tenth of a second per GB.

    Returns False without glibc, or if nothing was freed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


class TrimPolicy:
    """Decides when to return freed memory to the system. Pure: clock and sizes are arguments."""

    def __init__(self, resident_at_start: int, budget_bytes: int) -> None:
        """Start from a resident size. `budget_bytes`: the allowed growth of the process, held stashes included."""
        self._resident_at_start = resident_at_start
        self._budget_bytes = budget_bytes
        self._freed_at: float | None = None  # None: nothing freed since memory was last returned
        self._next_look = 0.0

    def freed(self, now: float) -> None:
        """Record that memory was freed: a pass or a session has ended."""
        self._freed_at = now

    def is_due(self, now: float, *, busy: bool, held_bytes: int, resident_bytes: int) -> bool:
        """Return whether to trim now: nothing freed for `IDLE_SECONDS`, or growth over the held bytes or the budget."""
        if self._freed_at is None or now < self._next_look:
            return False
        if busy or now - self._freed_at < IDLE_SECONDS:
            if resident_bytes - self._resident_at_start <= min(held_bytes + KEPT_BYTES, self._budget_bytes):
                return False
        else:
            self._freed_at = None
        self._next_look = now + IDLE_SECONDS
        return True
