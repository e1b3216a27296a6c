"""Non-blocking standard output and error: written by threads, so an unread pipe cannot block.

Covers logs, the ready line, warnings, tracebacks and Python prints of libraries. Lines over the buffer are dropped and
counted. Writes to the descriptor from C bypass the threads; to a full pipe they fail at once.
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

MAX_WAITING_BYTES = 256 << 10  # buffered for each of the two streams
EXIT_SECONDS = 2.0  # wait at exit for buffered lines


class Outlet(io.RawIOBase):
    """Raw stream that buffers writes for its thread. `dropped` formats the line for a number of dropped lines."""

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
        """Wait until all is written. False after `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, seconds)

    def end(self) -> None:
        """End the thread after all is written."""
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
                # The dropped lines all came after the buffered ones.
                batch, dropped = b"".join(self._waiting), self._dropped
                self._waiting.clear()
                self._waiting_bytes = self._dropped = 0
                self._writing = True
            told = self._line_of_dropped(dropped).encode(errors="backslashreplace") if dropped else b""
            try:
                self._write_all(batch + told)
            except OSError as error:  # closed by its reader, or a full disk, which may have room later
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
            except BlockingIOError:  # set non-blocking by another process that shares it
                select.select([], [self._descriptor], [])


@contextlib.contextmanager
def written_by_threads(dropped: Callable[[int], str]) -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` non-blocking. On exit, write buffered lines for up to `EXIT_SECONDS`."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_by_thread(stream, dropped) for stream in before)
    waiting = [(outlet.fileno(), _never_wait(outlet.fileno())) for outlet in _outlets()]
    try:
        yield
    finally:
        # A stuck stream stays non-blocking: writes of the interpreter at its end must not block either.
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
    """Wait until standard output and error are written. False after `seconds`."""
    drained = [outlet.drain(seconds) for outlet in _outlets()]  # both, even if one is stuck
    return all(drained)


def check_output() -> None:
    """Raise `RunFailed` if earlier output was lost: a full disk, or a pipe closed by its reader."""
    for outlet in _outlets():
        if outlet.error is not None:
            name = "output" if outlet is getattr(sys.stdout, "buffer", None) else "error"
            raise RunFailed(f"standard {name} cannot be written: {outlet.error.strerror}")


def _outlets() -> list[Outlet]:
    buffers = [getattr(stream, "buffer", None) for stream in (sys.stdout, sys.stderr)]
    return [buffer for buffer in buffers if isinstance(buffer, Outlet)]


def _by_thread(stream: Any, dropped: Callable[[int], str]) -> Any:
    if stream is None:  # closed by the parent process
        return open(os.devnull, "w")
    try:
        descriptor = stream.fileno()
    except OSError:  # a buffer in memory
        return stream
    stream.flush()
    outlet: Any = Outlet(descriptor, dropped)
    return io.TextIOWrapper(outlet, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def _never_wait(descriptor: int) -> int | None:
    """Make writes to a pipe fail instead of block, and return a duplicate of the original descriptor.

    O_NONBLOCK belongs to the open file, which the parent process shares; so the pipe is opened once more.
    """
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return None
    try:
        opened = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # not Linux, another user's pipe, or a pipe without a reader
        return None
    before = os.dup(descriptor)
    os.dup2(opened, descriptor)
    os.close(opened)
    return before


def _open_closed_descriptors() -> None:
    """Open closed descriptors 0 to 2: a socket with such a number would receive the output of C libraries."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
