"""Cancellation of a thread's requests by another thread, or by a signal. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from zsl.errors import CancelledByClientError


class Cancellation:
    """Says once that nobody wants the result of some work any more."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, as a signal may come at any point
        self._is_set = False
        self._give_up: Callable[[], None] | None = None

    def is_set(self) -> bool:
        """Return whether the work is cancelled."""
        return self._is_set

    def set(self) -> None:
        """Cancel the work: the request that it waits for is given up, and it sends no other."""
        with self._lock:
            self._is_set = True
            give_up, self._give_up = self._give_up, None
        if give_up is not None:
            give_up()

    @contextmanager
    def of_requests(self) -> Iterator[None]:
        """Make this thread's requests within `with` end when the work is cancelled, with `CancelledByClientError`."""
        before = _of_thread.set(self)
        try:
            yield
        finally:
            _of_thread.reset(before)

    @contextmanager
    def _of_one(self, give_up: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            if self._is_set:
                raise CancelledByClientError()
            before, self._give_up = self._give_up, give_up
        try:
            yield
        finally:
            with self._lock:
                self._give_up = before


_of_thread: ContextVar[Cancellation | None] = ContextVar("zsl_cancellation", default=None)


@contextmanager
def given_up_by(give_up: Callable[[], None]) -> Iterator[None]:
    """Have `give_up` called, by another thread or a signal's handler, if this thread's work is cancelled within `with`.

    Raises `CancelledByClientError` if it is already.
    """
    cancellation = _of_thread.get()
    if cancellation is None:
        yield
        return
    with cancellation._of_one(give_up):
        yield
