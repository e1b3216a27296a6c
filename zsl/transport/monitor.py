"""Monitor of a ZeroMQ socket: libzmq's connection events, as numbers.

`zmq.Event` names the events; their values are explained where they are used.
"""

from __future__ import annotations

import struct
from itertools import count

import zmq

_EVENT = struct.Struct("=HI")
_numbers = count()
_POLLIN = int(zmq.POLLIN)  # operations on a member of its enum take longer than to ask the socket


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Return whether a message waits to be received."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)


class Monitor:
    """Monitor of `events` of the socket `watched`. Poll `socket`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], watched: zmq.Socket[bytes], events: int) -> None:
        self._watched = watched
        address = f"inproc://zsl-monitor-{next(_numbers)}"
        watched.monitor(address, events)
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # with a limit, libzmq's I/O thread would block until events are read
        self.socket.connect(address)

    def next_event(self) -> tuple[int, int] | None:
        """Return the next event and its value, or None."""
        if not is_readable(self.socket):
            return None
        event, value = _EVENT.unpack(self.socket.recv_multipart(zmq.NOBLOCK)[0])
        return event, value

    def close(self) -> None:
        """Close before the watched socket: an open monitor would block the end of the context. Idempotent."""
        if not self._watched.closed:
            self._watched.disable_monitor()
        self.socket.close(0)
