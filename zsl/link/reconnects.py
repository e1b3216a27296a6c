"""Lost connections and failed attempts of a client: their number, their causes, and when to log them.

A connection that is lost again and again has a cause that a single line would hide, and one that stays away must not be
silent. Pure: the clock is given.
"""

from __future__ import annotations

from collections import Counter, deque

WINDOW_SECONDS = 60.0
ALL_ARE_SAID = 4  # of those in the window; then one line in so many seconds
BETWEEN_LINES_SECONDS = 5.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 10.0, 60.0


class Reconnects:
    """`lost`, `failed` and `opened` say what happened; the first two return what is to be logged of it, or None."""

    def __init__(self) -> None:
        self.count = 0  # of all lost connections
        self._lost: deque[tuple[float, str]] = deque(maxlen=1000)
        self._said = 0.0
        self._tells = False  # a line was logged since a session was open
        self._attempts = 0  # that failed since a session was open
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
        """Count an attempt to open a session that came to nothing."""
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
        """Begin anew with attempts: a session is open. Returns whether to log that, because its loss was logged."""
        tells, self._tells, self._attempts = self._tells, False, 0
        return tells
