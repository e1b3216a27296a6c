"""Shared lock of threads: many hold it shared, or one exclusively."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Read-write lock. A thread that wants it exclusively goes before those that want it shared later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = 0
        self._exclusive = 0  # threads that hold it exclusively, or wait to

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._exclusive)
            self._holders += 1
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold it alone."""
        with self._changed:
            self._exclusive += 1
            try:
                self._changed.wait_for(lambda: not self._holders)
                self._holders += 1
            except BaseException:
                self._exclusive -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            self._release(exclusive=1)

    def _release(self, exclusive: int = 0) -> None:
        with self._changed:
            self._holders -= 1
            self._exclusive -= exclusive
            self._changed.notify_all()
