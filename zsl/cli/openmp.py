"""Let OpenMP's threads sleep soon where other processes need the cores. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Some tens of microseconds: about as long as between two operations of a pass. libgomp's own count is 300,000.
SPINS = "1000"


def spin_shortly_if_shared(environ: MutableMapping[str, str]) -> bool:
    """Lower libgomp's count of spins if more threads are ready to run than there are cores; return whether it was done.

    The user's own variables stay. Call it before torch is imported.
    """
    if "GOMP_SPINCOUNT" in environ or "OMP_WAIT_POLICY" in environ or not hasattr(os, "getloadavg"):
        return False
    is_shared = os.getloadavg()[0] > (os.cpu_count() or 1)
    if is_shared:
        environ["GOMP_SPINCOUNT"] = SPINS
    return is_shared
