"""A daemon that answers just what a test says, in a thread of this process: also what no honest one would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import zmq

from zsl.trunk.requests.handshake import welcome_to
from zsl.trunk.settings import ServerSettings, TrunkInfo
from zsl.wire.frames import Frame, Message, decode, encode
from zsl.wire.messages import TO_DAEMON, Adapter, Header, Hello, Ping, Pong, Welcome, WorkHeader

from .echo import CUT, IDENTITY, ROW_TOKENS, TRAITS

SESSION, EPOCH = b"s" * 16, b"e" * 16
INFO = TrunkInfo(IDENTITY, CUT, "f32", False, ROW_TOKENS)

Answer = tuple[Header, Sequence[Frame]]


class Rogue:
    """Opens every session as `SESSION`, answers pings, and requests with what `answers` returns for a header.

    `hello`, if it is given, returns what is said to HELLO before the WELCOME. `heard` are the headers so far,
    `last` is the whole message that is being answered.
    """

    def __init__(
        self,
        answers: Callable[[Any], Sequence[Answer]],
        *,
        hello: Callable[[Hello, Welcome], Sequence[Header]] = lambda hello, welcome: (),
    ) -> None:
        self.answers = answers
        self._hello = hello
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self.endpoint = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self.heard: list[Header] = []
        self.last: Message
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            if self._router.poll(20):
                peer, *frames = self._router.recv_multipart()
                self.last = decode(frames, TO_DAEMON)
                header = self.last.header
                self.heard.append(header)
                for answer, buffers in self._to(header):
                    self._router.send_multipart([peer, *encode(answer, buffers)])

    def _to(self, header: Header) -> Sequence[Answer]:
        if isinstance(header, Hello):
            limits = ServerSettings(ping_seconds=0.1).limits(INFO)
            welcome = welcome_to(
                header, SESSION, EPOCH, INFO, replace(TRAITS, deterministic=True), None, limits, caches=True
            )
            return [(answer, ()) for answer in (*self._hello(header, welcome), welcome)]
        if isinstance(header, Ping):
            return [(pong_to(header), ())]
        return self.answers(header) if isinstance(header, WorkHeader | Adapter) else ()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(20)
        self._router.close()
        self._context.term()


def pong_to(ping: Ping) -> Pong:
    return Pong(session=ping.session, request=ping.request, epoch=EPOCH, progress_age_ms=0, inflight_requests=2**20)
