"""Count a client's lost connections and failed attempts, and limit how often they are logged.

Repeated losses are logged with their causes, and a long outage at intervals. Pure: the clock is an argument.
"""

from __future__ import annotations

from collections import Counter, deque

WINDOW_SECONDS = 60.0
ALL_ARE_SAID = 4  # lost connections in the window that are each logged
BETWEEN_LINES_SECONDS = 5.0  # after that
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 10.0, 60.0


class LostConnections:
    """Counts of losses and failures. `lost` and `failed` return the text to log, or None."""

    def __init__(self) -> None:
        self.count = 0  # of all lost connections
        self._lost: deque[tuple[float, str]] = deque(maxlen=1000)
        self._said = 0.0
        self._tells = False  # logged since the last open session
        self._attempts = 0  # failed since the last open session
        self._since = self._next_line = 0.0

    def lost(self, cause: str, now: float) -> str | None:
        """Count a lost connection."""
        self.count += 1
        self._lost.append((now, cause))
        while now - self._lost[0][0] > WINDOW_SECONDS:
            self._lost.popleft()
        count = len(self._lost)
        if count > ALL_ARE_SAID and now - self._said < BETWEEN_LINES_SECONDS:
            return None
        self._said = now
        self._tells = True
        if count == 1:
            return cause
        causes = Counter(cause for _, cause in self._lost).most_common()
        said = ", ".join(cause if times == count else f"{cause} ({times})" for cause, times in causes)
        return f"reconnected {count} times in {now - self._lost[0][0]:.0f} s: {said}"

    def failed(self, cause: str, now: float) -> str | None:
        """Count a failed attempt to open a session."""
        if not self._attempts:
            self._since, self._next_line = now, now + FIRST_WAIT_SECONDS
        self._attempts += 1
        if now < self._next_line:
            return None
        self._tells = True
        waited = now - self._since
        self._next_line = now + min(max(waited, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
        return f"no session after {self._attempts} attempts in {waited:.0f} s: {cause}"

    def opened(self) -> bool:
        """Reset the failed attempts: a session is open. Return whether to log it, because its loss was logged."""
        tells, self._tells, self._attempts = self._tells, False, 0
        return tells
