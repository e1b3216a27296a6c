"""Turns on one connection: requests run beside each other, or one waits until all others have ended and runs alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Read-write lock. New ones beside others wait for one that wants to run alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._alone = 0  # that run or wait

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Run beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._running += 1
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run while no other does."""
        with self._changed:
            self._alone += 1
            try:
                self._changed.wait_for(lambda: not self._running)
                self._running += 1
            except BaseException:
                self._alone -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            self._end(alone=1)

    def _end(self, alone: int = 0) -> None:
        with self._changed:
            self._running -= 1
            self._alone -= alone
            self._changed.notify_all()
