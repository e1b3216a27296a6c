"""Let OpenMP's threads sleep sooner than libgomp would. Imports no torch.

A thread that waits spins before it sleeps. A daemon and its clients compute in turns, often on the same cores: one
that spins takes them from another that computes. `bin/bench decode --part sessions --sessions 1` measures it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from statistics import median

# Longer than the pause between two operations of a pass, and shorter than that between passes. libgomp's own count is
# 300,000, some milliseconds.
SPINS = "30000"
SPINS_WHERE_SHARED = "0"
LOOKS, LOOK_EVERY_SECONDS = 5, 0.02


def limit_spinning(environ: MutableMapping[str, str]) -> None:
    """Set how long libgomp's threads spin, unless the user has. Call it before torch is imported."""
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPINS)


def stop_spinning_if_shared(
    environ: MutableMapping[str, str],
    *,
    count_ready: Callable[[], int] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Have libgomp's threads not spin if others have as many threads ready to run as there are cores. Return if so.

    The user's own variables stay. Looks for a tenth of a second; an average over a minute would tell of work that has
    ended. Call it before torch is imported.
    """
    if "GOMP_SPINCOUNT" in environ or "OMP_WAIT_POLICY" in environ:
        return False
    ready = []
    for _ in range(LOOKS):
        ready.append((count_ready or ready_threads)())
        sleep(LOOK_EVERY_SECONDS)
    is_shared = median(ready) >= (os.cpu_count() or 1)
    if is_shared:
        environ["GOMP_SPINCOUNT"] = SPINS_WHERE_SHARED
    return is_shared


def ready_threads() -> int:
    """Return the number of other threads that run or are ready to; 0 without Linux's /proc."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    except OSError:
        return 0
