"""A bounded share of the loop's time, for connections without a session. Pure: the clock is given."""

from __future__ import annotations

# The share of the time, and how much of it may be saved up.
SHARE = 0.1
MAX_SAVED_SECONDS = 0.05


class TimeShare:
    """Earns `SHARE` of the time that passes, and is charged for each turn."""

    def __init__(self, now: float) -> None:
        self._saved_seconds = MAX_SAVED_SECONDS
        self._at = now

    def charge(self, began: float, ended: float, *, bounded: bool) -> float:
        """Charge a turn; return the seconds until the next one may begin. Without `bounded` that is 0."""
        earned = (began - self._at) * SHARE
        self._saved_seconds = min(self._saved_seconds + earned, MAX_SAVED_SECONDS) - (ended - began)
        self._at = began
        if not bounded:
            self._saved_seconds = max(self._saved_seconds, 0.0)
        return max(-self._saved_seconds / SHARE, 0.0)
