"""Standard output and error written by threads of their own: a pipe that nobody reads stops no daemon.

Covers logs, the ready line, warnings, tracebacks and what libraries print in Python. Lines that find no room are
dropped and counted. What a library writes to the descriptor in C does not pass here: where that is a full pipe, its
write fails at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from zsl.errors import RunFailed

MAX_WAITING_BYTES = 256 << 10  # of what is written later, for each of both
EXIT_SECONDS = 2.0  # for what waits, when the daemon ends


class Outlet(io.RawIOBase):
    """Takes what is written at once; a thread passes it on. `dropped` gives the line that tells how many were lost."""

    def __init__(self, descriptor: int, dropped: Callable[[int], str]) -> None:
        self._descriptor = descriptor
        self._line_of_dropped = dropped
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._waiting_bytes = self._dropped = 0
        self._writing = self._ending = False
        self.error: OSError | None = None  # of the last write
        threading.Thread(target=self._run, name=f"zsl-output-{descriptor}", daemon=True).start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        line = bytes(data)
        with self._changed:
            if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
                self._dropped += line.count(b"\n")
            else:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
                self._changed.notify_all()
        return len(line)

    def drain(self, seconds: float) -> bool:
        """Wait until nothing waits any more. False if the time was not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, seconds)

    def end(self) -> None:
        """End the thread, when all is written."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                # All lines that were dropped came after those that wait.
                batch, dropped = b"".join(self._waiting), self._dropped
                self._waiting.clear()
                self._waiting_bytes = self._dropped = 0
                self._writing = True
            told = self._line_of_dropped(dropped).encode(errors="backslashreplace") if dropped else b""
            try:
                self._write_all(batch + told)
            except OSError as error:  # a reader that has gone, or a full disk, which may have room again
                self.error = error
                with self._changed:
                    self._dropped += dropped + batch.count(b"\n")
            else:
                self.error = None

    def _write_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process that shares it made it so
                select.select([], [self._descriptor], [])


@contextlib.contextmanager
def written_by_threads(dropped: Callable[[int], str]) -> Iterator[None]:
    """Have `sys.stdout` and `sys.stderr` never block. At the end what waits is written, for a bounded time."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_by_thread(stream, dropped) for stream in before)
    waiting = [(outlet.fileno(), _never_wait(outlet.fileno())) for outlet in _outlets()]
    try:
        yield
    finally:
        # A stream that is stuck stays as it is: what the interpreter writes when it ends must not wait either.
        drained = drain_output(EXIT_SECONDS)
        if drained:
            for outlet in _outlets():
                outlet.end()
            sys.stdout, sys.stderr = before
        for descriptor, own in waiting:
            if own is not None:
                if drained:
                    os.dup2(own, descriptor)
                os.close(own)


def drain_output(seconds: float) -> bool:
    """Wait until standard output and error are written. False if one is stuck."""
    drained = [outlet.drain(seconds) for outlet in _outlets()]  # both, though one be stuck
    return all(drained)


def check_output() -> None:
    """Raises `RunFailed` if what was written so far is lost: a full disk, or a pipe whose reader has gone."""
    for outlet in _outlets():
        if outlet.error is not None:
            name = "output" if outlet is getattr(sys.stdout, "buffer", None) else "error"
            raise RunFailed(f"standard {name} cannot be written: {outlet.error.strerror}")


def _outlets() -> list[Outlet]:
    buffers = [getattr(stream, "buffer", None) for stream in (sys.stdout, sys.stderr)]
    return [buffer for buffer in buffers if isinstance(buffer, Outlet)]


def _by_thread(stream: Any, dropped: Callable[[int], str]) -> Any:
    if stream is None:  # closed by whoever started this
        return open(os.devnull, "w")
    try:
        descriptor = stream.fileno()
    except OSError:  # a buffer in memory
        return stream
    stream.flush()
    outlet: Any = Outlet(descriptor, dropped)
    return io.TextIOWrapper(outlet, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def _never_wait(descriptor: int) -> int | None:
    """Have writes to a pipe fail where they would wait, and return a descriptor of it as it was.

    O_NONBLOCK belongs to an open file, which is shared with whoever started this; so the pipe is opened once more.
    """
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return None
    try:
        opened = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # not Linux, another user's, or nobody is there to read it
        return None
    before = os.dup(descriptor)
    os.dup2(opened, descriptor)
    os.close(opened)
    return before


def _open_closed_descriptors() -> None:
    """Open descriptors 0 to 2 where they are closed: a socket of that number would get what a library prints in C."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
