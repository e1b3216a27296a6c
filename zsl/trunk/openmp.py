"""Let OpenMP's threads sleep sooner than libgomp would. Imports no torch.

A thread that waits spins before it sleeps. A daemon and its clients compute in turns, often on the same cores: one
that spins takes them from another that computes. `bin/bench decode --part sessions --sessions 1` measures it.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Longer than the pause between two operations of a pass, and shorter than that between passes. libgomp's own count is
# 300,000, some milliseconds.
SPINS = "30000"
SPINS_WHERE_SHARED = "0"


def limit_spinning(environ: MutableMapping[str, str]) -> bool:
    """Set how long libgomp's threads spin. Return whether other processes use the cores.

    They do if more threads are ready to run than there are cores. The user's own variables stay. Call it before torch
    is imported.
    """
    if "GOMP_SPINCOUNT" in environ or "OMP_WAIT_POLICY" in environ:
        return False
    is_shared = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
    environ["GOMP_SPINCOUNT"] = SPINS_WHERE_SHARED if is_shared else SPINS
    return is_shared
