"""A bare DEALER that says what a test wants it to say, and hears what the daemon says back."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import zmq

from zsl.wire.frames import Frame, decode, encode
from zsl.wire.messages import TO_CLIENT, Cut, Forward, Header, Hello, ModelIdentity, TensorDescriptor, Welcome

WAIT_MS = 20_000


class Peer:
    """Speaks the protocol by hand."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)

    def send_frames(self, frames: Sequence[bytes | Frame]) -> None:
        self._socket.send_multipart(frames)

    def send(self, header: Header, buffers: Sequence[Frame] = ()) -> None:
        self.send_frames(encode(header, buffers))

    def hear(self) -> Header:
        """The next message, within a bounded time."""
        if not self._socket.poll(WAIT_MS):
            raise TimeoutError("the daemon said nothing")
        return decode(self._socket.recv_multipart(), TO_CLIENT).header

    def ask(self, header: Header, buffers: Sequence[Frame] = ()) -> Header:
        self.send(header, buffers)
        return self.hear()

    def hello(self, model: ModelIdentity | None = None, cut: Cut | None = None) -> Welcome:
        welcome = self.ask(Hello(request=0, software="test", dtype="f32", model=model, cut=cut))
        assert isinstance(welcome, Welcome), welcome
        return welcome

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
        "keep": False,
        "tensors": [activations],
    }
    return Forward.model_validate({**fields, **changes}), [bytes(nbytes)]
