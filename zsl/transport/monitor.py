"""The monitor of a ZeroMQ socket: what libzmq tells about its connections, as numbers.

Knows not what they mean; `zmq.Event` has the events, and what comes with each is said where it is used.
"""

from __future__ import annotations

import struct
from itertools import count

import zmq

_EVENT = struct.Struct("=HI")
_numbers = count()


class Monitor:
    """Watches `watched` for `events`, from now on. `socket` is there to be polled."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], watched: zmq.Socket[bytes], events: int) -> None:
        self._watched = watched
        address = f"inproc://zsl-monitor-{next(_numbers)}"
        watched.monitor(address, events)
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # with a limit, libzmq's I/O thread would wait until it is read
        self.socket.connect(address)

    def next_event(self) -> tuple[int, int] | None:
        """The next event and its value, or None if nothing happened."""
        if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return None
        event, value = _EVENT.unpack(self.socket.recv_multipart(zmq.NOBLOCK)[0])
        return event, value

    def close(self) -> None:
        """Before the watched socket is closed: an open monitor would keep the context from ending. Again is nothing."""
        if not self._watched.closed:
            self._watched.disable_monitor()
        self.socket.close(0)
