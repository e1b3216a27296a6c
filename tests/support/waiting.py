"""Wait for a state of a server that no event tells."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(seconds: float, true: Callable[[], bool]) -> None:
    """Wait until a condition holds, and fail if that takes longer."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)
