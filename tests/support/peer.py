"""A bare DEALER that says what a test wants it to say, and hears what the daemon says back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from types import TracebackType
from typing import Self

import zmq

from zsl.transport.curve_keys import ClientKeys
from zsl.wire.frames import Frame, decode, encode
from zsl.wire.messages import (
    TO_CLIENT,
    Bye,
    Cut,
    Forward,
    Header,
    Hello,
    ModelIdentity,
    Status,
    StatusRequest,
    TensorDescriptor,
    Welcome,
)

WAIT_MS = 20_000


class Peer:
    """Speaks the protocol by hand."""

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        self.wait_ms = WAIT_MS
        self._hellos = 1_000_000  # far from the ids that tests give
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        if keys is not None:
            self._socket.curve_serverkey = keys.server
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.own.public, keys.own.secret
        self._socket.connect(endpoint)

    def send_frames(self, frames: Sequence[bytes | Frame]) -> None:
        self._socket.send_multipart(frames)

    def send(self, header: Header, buffers: Sequence[Frame] = ()) -> None:
        self.send_frames(encode(header, buffers))

    def hear(self) -> Header:
        """The next message, within a bounded time."""
        if not self._socket.poll(self.wait_ms):
            raise TimeoutError("the daemon said nothing")
        return decode(self._socket.recv_multipart(), TO_CLIENT).header

    def answers_until_quiet(self) -> int:
        """Count the messages received until the daemon has handled all that was sent."""
        last = 0xABCDEF
        self.send(StatusRequest(request=last))
        for heard in count(1):
            header = self.hear()
            if isinstance(header, Status) and header.request == last:
                return heard
        raise AssertionError

    def leave_nothing(self) -> None:
        """End whatever session may be open on this connection."""
        self._hellos += 1
        self.send(Hello(request=self._hellos, software="test", dtype="f32", model=None, cut=None, resume=None))
        while not isinstance(welcome := self.hear(), Welcome):
            pass  # late answers
        self.send(Bye(session=welcome.session, epoch=welcome.epoch))

    def ask(self, header: Header, buffers: Sequence[Frame] = ()) -> Header:
        self.send(header, buffers)
        return self.hear()

    def hello(
        self, model: ModelIdentity | None = None, cut: Cut | None = None, *, resume: bytes | None = None
    ) -> Welcome:
        self._hellos += 1
        hello = Hello(request=self._hellos, software="test", dtype="f32", model=model, cut=cut, resume=resume)
        welcome = self.ask(hello)
        assert isinstance(welcome, Welcome), welcome
        return welcome

    def status(self) -> Status:
        """The daemon's answer comes when it has read what was sent before."""
        answer = self.ask(StatusRequest(request=9))
        assert isinstance(answer, Status), answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()


def forward(
    welcome: Welcome, request: int, *, rows: int = 1, tokens: int = 2, hidden: int = 4, **changes: object
) -> tuple[Header, list[bytes]]:
    """A FORWARD of zeros, in fp32, and its buffer."""
    nbytes = rows * tokens * hidden * 4
    activations = TensorDescriptor(role="activations", dtype="f32", shape=(rows, tokens, hidden), nbytes=nbytes)
    fields: dict[str, object] = {
        "session": welcome.session,
        "epoch": welcome.epoch,
        "request": request,
        "attempt": 0,
        "budget_ms": 20_000,
        "adapter": None,
        "keep": False,
        "reveal": [],
        "cache": None,
        "tensors": [activations],
    }
    return Forward.model_validate({**fields, **changes}), [bytes(nbytes)]
