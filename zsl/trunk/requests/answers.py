"""Encode answers and errors, and send them through the router."""

from __future__ import annotations

from dataclasses import dataclass

from zsl.errors import WireError
from zsl.transport.router import Router
from zsl.trunk.requests.request_table import Request
from zsl.trunk.sessions.sessions import Session
from zsl.trunk.work import Done
from zsl.wire.frames import Frame, encode
from zsl.wire.messages import MAX_TEXT_CHARS, Error, Header, Result, TensorDescriptor


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Number of requests merged in a pass, and its start and end (seconds, monotonic)."""

    merged: int
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Answers:
    """Encodes and sends the messages of a daemon's run, `epoch`."""

    router: Router
    epoch: bytes

    def send(self, peer: bytes, header: Header) -> bool:
        """Send a message without tensors. False if the peer is disconnected or does not read."""
        return self.router.send(peer, encode(header))

    def send_error(self, peer: bytes, error: WireError, *, request: int | None, session: bytes | None) -> None:
        """Send the error of a message with this request and session id."""
        message = Error(
            request=request,
            session=session,
            epoch=self.epoch,
            code=error.code,
            retry=error.retry,
            retry_after_ms=error.retry_after_ms,
            text=str(error)[:MAX_TEXT_CHARS],
        )
        self.send(peer, message)

    def send_tensor(self, session: Session, request: int, descriptor: TensorDescriptor, buffer: Frame) -> None:
        """Send the result of a request that needs no pass. The buffer is not copied."""
        result = Result(
            session=session.id,
            request=request,
            epoch=self.epoch,
            merged=1,
            queue_us=0,
            compute_us=0,
            tensors=[descriptor],
        )
        self.router.send(session.peer, encode(result, [buffer]))

    def result(self, request: Request, done: Done, times: PassTimes) -> list[Frame]:
        """Encode the result of a request."""
        result = Result(
            session=request.session.id,
            request=request.header.request,
            epoch=self.epoch,
            merged=times.merged,
            queue_us=round((times.started - request.arrived) * 1e6),
            compute_us=round((times.ended - times.started) * 1e6),
            tensors=[descriptor for descriptor, _ in done.buffers.values()],
        )
        return encode(result, [buffer for _, buffer in done.buffers.values()], checked=request.session.checks)
