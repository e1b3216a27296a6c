"""Let OpenMP's threads sleep soon where other processes need the cores. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# libgomp's own count is 300,000, some milliseconds.
SPINS = "0"


def stop_spinning_if_shared(environ: MutableMapping[str, str]) -> bool:
    """Have libgomp's threads not spin if more threads are ready to run than there are cores. Return whether so.

    The user's own variables stay. Call it before torch is imported.
    """
    if "GOMP_SPINCOUNT" in environ or "OMP_WAIT_POLICY" in environ or not hasattr(os, "getloadavg"):
        return False
    is_shared = os.getloadavg()[0] > (os.cpu_count() or 1)
    if is_shared:
        environ["GOMP_SPINCOUNT"] = SPINS
    return is_shared
