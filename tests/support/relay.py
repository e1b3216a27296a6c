"""A ROUTER that stands between a client and a daemon and keeps every byte that the client sends."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

import zmq


class Relay:
    """Passes messages both ways, unchanged.

    `from_client` are all frames that a client sent, in order; `bytes_up` and `bytes_down` those of each connection.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.linger = 0
        self.endpoint = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._daemon = endpoint
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}  # to the daemon, by client
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self.from_client: list[bytes] = []
        self.bytes_up: Counter[bytes] = Counter()
        self.bytes_down: Counter[bytes] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        poller = zmq.Poller()
        stop = self._context.socket(zmq.PAIR)
        stop.connect("inproc://stop")
        for readable in (self._front, stop):
            poller.register(readable, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if stop in ready:
                stop.close(0)
                return
            if self._front in ready:
                client, *frames = self._front.recv_multipart()
                self.from_client += frames
                self.bytes_up[client] += sum(map(len, frames))
                if client not in self._backs:
                    back = self._backs[client] = self._context.socket(zmq.DEALER)
                    back.linger = 0
                    back.connect(self._daemon)
                    poller.register(back, zmq.POLLIN)
                self._backs[client].send_multipart(frames)
            for client, back in self._backs.items():
                if back in ready:
                    answer = back.recv_multipart()
                    self.bytes_down[client] += sum(map(len, answer))
                    self._front.send_multipart([client, *answer])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.send(b"")
        self._thread.join(20)
        for opened in (self._front, *self._backs.values(), self._stop):
            opened.close(0)
        self._context.term()
