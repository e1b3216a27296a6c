"""What was sent and is still in memory, because its peer has not read so far: how much, and since when.

Only large frames are counted: ZeroMQ sends these out of their own memory, and tells when it is done with it.
Knows no socket; the clock comes from outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import zmq

# Smaller frames are copied by pyzmq, and not worth to be followed.
TRACKED_BYTES = zmq.COPY_THRESHOLD
# How long the oldest frame of a peer may wait: so long, and as long as it takes at this speed.
SLOW_READER_SECONDS = 30.0
MIN_READ_BYTES_PER_SECOND = 100_000


@dataclass(slots=True)
class _Waiting:
    """The frames of one peer, oldest first, and since when the oldest one is that."""

    since: float
    frames: deque[tuple[zmq.MessageTracker, int]] = field(default_factory=deque)
    nbytes: int = 0

    def look(self, now: float) -> None:
        """Forget what has been sent."""
        while self.frames and self.frames[0][0].done:
            self.nbytes -= self.frames.popleft()[1]
            self.since = now  # others have moved on, so this peer reads


class Unsent:
    """The large frames that each peer has not read. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[bytes, _Waiting] = {}

    def add(self, peer: bytes, frames: Iterable[zmq.Frame]) -> None:
        """These frames, made with `track`, have been given to ZeroMQ."""
        now = self._clock()
        waiting = self._look(peer, now)
        if waiting is None:
            waiting = self._waiting[peer] = _Waiting(now)
        for frame in frames:
            assert isinstance(frame.tracker, zmq.MessageTracker)
            waiting.frames.append((frame.tracker, len(frame)))
            waiting.nbytes += len(frame)

    def nbytes(self, peer: bytes) -> int:
        """The bytes that wait for a peer."""
        waiting = self._look(peer, self._clock())
        return 0 if waiting is None else waiting.nbytes

    @property
    def all_nbytes(self) -> int:
        """The bytes that wait for all peers."""
        now = self._clock()
        return sum(waiting.nbytes for peer in list(self._waiting) if (waiting := self._look(peer, now)) is not None)

    def slow(self, now: float) -> list[bytes]:
        """The peers whose oldest frame waits too long. What came off before it counts for them."""
        return [
            peer
            for peer in list(self._waiting)
            if (waiting := self._look(peer, now)) is not None
            and now - waiting.since > SLOW_READER_SECONDS + waiting.frames[0][1] / MIN_READ_BYTES_PER_SECOND
        ]

    def forget(self, peer: bytes) -> None:
        """The peer is gone, and with it what waited."""
        self._waiting.pop(peer, None)

    def _look(self, peer: bytes, now: float) -> _Waiting | None:
        waiting = self._waiting.get(peer)
        if waiting is not None:
            waiting.look(now)
            if not waiting.frames:
                del self._waiting[peer]
                return None
        return waiting
