"""Echo over a bare ROUTER and DEALER of pyzmq: the lower bound of a ZeroMQ round trip from Python.

Blocking sockets, one payload frame that is not copied, no header, no threads of its own.

    python benchmarks/baselines/bare_zmq.py          serves on a free port, and prints {"port": …} when ready
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import Self

import zmq

Payload = bytes | memoryview


class BareClient:
    """A DEALER. `echo` waits for the answer."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"tcp://{endpoint}")

    def echo(self, payload: Payload) -> memoryview:
        self._socket.send(payload, copy=False)
        return self._socket.recv(copy=False).buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)


def serve() -> None:
    """Answer each message with itself, until the process is ended."""
    socket = zmq.Context().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(json.dumps({"port": port}), flush=True)
    while True:
        socket.send_multipart(socket.recv_multipart(copy=False), copy=False)


if __name__ == "__main__":
    serve()
