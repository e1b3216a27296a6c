"""Keep freed memory for the next pass.

A pass allocates and frees some hundreds of megabytes in blocks of about one. By default glibc gives such blocks back
to the system as soon as they are free, from a thread other than the main one above all, and the next pass pays for
every page again.
"""

from __future__ import annotations

import ctypes

# From malloc.h. What `mallopt` takes: the largest threshold that glibc allows, and how much may stay free.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_MMAP_THRESHOLD_BYTES = 32 << 20
KEPT_BYTES = 1 << 30


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
