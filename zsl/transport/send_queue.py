"""Send queue of one connection: seal frames in order, and write as much as the kernel accepts."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import islice

from zsl.transport.mechanisms import Mechanism
from zsl.transport.zmtp import MORE
from zsl.wire.frames import Frame

# Maximum time to receive a message, and to send the oldest frame: a base, plus the time that it takes at this speed.
SLOW_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 100_000
BUFFERS_PER_WRITE = 64
# Frames from this size on are sealed and opened on another thread.
THREAD_BYTES = 64 * 1024
# Smaller frames are joined, so that one call sends them.
COPIED_BYTES = 8 * 1024


def slow_seconds(nbytes: int) -> float:
    """Return the time from which on so many bytes cross too slowly."""
    return SLOW_SECONDS + nbytes / MIN_BYTES_PER_SECOND


class SendQueue:
    """Frames that a peer has not read. `messages` and `nbytes` count what waits.

    `executor` seals large frames; its results return by `call_soon`, and then `write` is called, to write the queue.
    Not thread-safe; `clock` returns seconds.
    """

    def __init__(
        self,
        connected: socket.socket,
        mechanism: Mechanism,
        *,
        executor: Executor | None,
        call_soon: Callable[..., object],
        write: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._socket = connected
        self._mechanism = mechanism
        self._executor = executor
        self._call_soon = call_soon
        self._write = write
        self._clock = clock
        # Unsent part of a buffer, its full size, and whether it ends a message.
        self._sealed: deque[tuple[memoryview, int, bool]] = deque()
        self._unsealed: deque[tuple[int, Frame]] = deque()  # flags and body; the first may be on another thread
        self._sealing = False
        self._since = clock()  # of the last progress
        self.messages = 0
        self.nbytes = 0

    @property
    def has_sealed(self) -> bool:
        """True if there is something to write now."""
        return bool(self._sealed)

    @property
    def is_empty(self) -> bool:
        """True if nothing waits, sealed or not."""
        return not self._sealed and not self._unsealed

    def is_slow(self, now: float) -> bool:
        """Return whether the oldest unsent frame waits too long, counted from the last completed one."""
        return bool(self._sealed) and now - self._since > slow_seconds(self._sealed[0][1])

    def add(self, frames: Sequence[Frame]) -> None:
        """Add a message, whose memory must not be written any more."""
        if not self._sealed:
            self._since = self._clock()
        self.messages += 1
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            self._unsealed.append((0 if index == last else MORE, frame))
            self.nbytes += len(frame)
        self._seal()

    def put(self, data: Frame | bytearray, *, ends: bool = False) -> None:
        """Add bytes that need no sealing. `ends`: they end a message."""
        self._sealed.append((memoryview(data), len(data), ends))
        self.nbytes += len(data)

    def write(self) -> None:
        """Write as much as the kernel accepts now. Raises `OSError` if the connection is lost."""
        try:
            while self._sealed:
                sent = self._socket.sendmsg([view for view, _, _ in islice(self._sealed, BUFFERS_PER_WRITE)])
                self.nbytes -= sent
                while self._sealed and sent >= len(self._sealed[0][0]):
                    view, _, ends = self._sealed.popleft()
                    sent -= len(view)
                    self.messages -= ends
                    self._since = self._clock()  # the peer reads
                if sent:
                    view, nbytes, ends = self._sealed[0]
                    self._sealed[0] = view[sent:], nbytes, ends
        except (BlockingIOError, InterruptedError):
            pass

    def clear(self) -> None:
        """Drop everything."""
        self._sealed.clear()
        self._unsealed.clear()
        self.nbytes = self.messages = 0

    def _seal(self) -> None:
        """Seal waiting frames, up to one that another thread has to seal."""
        together = bytearray()
        while self._unsealed and not self._sealing:
            flags, body = self._unsealed[0]
            if self._executor is not None and len(body) >= THREAD_BYTES:
                self._sealing = True
                sealed = self._executor.submit(self._mechanism.seal, flags, body)
                sealed.add_done_callback(lambda done: self._call_soon(self._sealed_elsewhere, done))
                break
            self._unsealed.popleft()
            self.nbytes -= len(body)
            before, crossing = self._mechanism.seal(flags, body)
            together += before
            if len(crossing) < COPIED_BYTES:
                together += crossing
                if not flags & MORE:
                    self.put(together, ends=True)
                    together = bytearray()
            else:
                self.put(together)
                self.put(crossing, ends=not flags & MORE)
                together = bytearray()
        if together:
            self.put(together)

    def _sealed_elsewhere(self, done: object) -> None:
        self._sealing = False
        if not self._unsealed:  # cleared meanwhile
            return
        flags, body = self._unsealed.popleft()
        self.nbytes -= len(body)
        before, crossing = done.result()  # type: ignore[attr-defined]
        self.put(before)
        self.put(crossing, ends=not flags & MORE)
        self._seal()
        self._write()
