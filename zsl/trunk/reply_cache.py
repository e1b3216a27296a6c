"""A cache of answers, for requests that come again: delivery is at least once, so each is computed once.

A client that lost its connection asks again with the same request id. Answered ids are remembered for a while, and
their answers while there is memory. Losing one costs time only: a forward is computed again, and the client sends a
backward whose step is gone again in full. Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from zsl.errors import MalformedError
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward

REMEMBERED_PER_SESSION = 256  # requests

_Asked = tuple[object, ...]


def asked_by(header: Forward | Backward) -> _Asked:
    """Fingerprint a request: equal for two deliveries of it. (A backward may bring its activations along, or not.)"""
    match header:
        case Backward():
            return "backward", header.step, next((d for d in header.tensors if d.role == "gradients"), None)
        case Forward():
            return "forward", header.keep, *header.tensors


@dataclass(slots=True)
class Reply:
    """One answered request. `frames` None: the answer itself was given up."""

    asked: _Asked
    frames: Sequence[Frame] | None
    nbytes: int


class ReplyCache:
    """The requests that were answered, by session, and the newest answers, up to `max_bytes` of all sessions."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._replies: dict[bytes, OrderedDict[int, Reply]] = {}
        self._kept: OrderedDict[tuple[bytes, int], Reply] = OrderedDict()  # those with frames, oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, session: bytes, header: Forward | Backward, frames: Sequence[Frame]) -> None:
        """Remember that a request was answered with these frames."""
        of_session = self._replies.setdefault(session, OrderedDict())
        self.give_up(session, header.request)
        of_session.pop(header.request, None)
        reply = Reply(asked_by(header), frames, sum(len(frame) for frame in frames))
        of_session[header.request] = self._kept[session, header.request] = reply
        self._bytes += reply.nbytes
        if len(of_session) > REMEMBERED_PER_SESSION:
            self.give_up(session, next(iter(of_session)))
            of_session.popitem(last=False)
        while self._bytes > self._max_bytes:
            self.give_up(*next(iter(self._kept)))

    def get(self, session: bytes, header: Forward | Backward) -> Reply | None:
        """Find the reply to this request. Raises `MalformedError` if its id was that of another one."""
        reply = self._replies.get(session, OrderedDict()).get(header.request)
        if reply is not None and reply.asked != asked_by(header):
            raise MalformedError("this request id was used for another request")
        return reply

    def give_up(self, session: bytes, request: int) -> None:
        """Drop the frames of an answer: its client has them, or memory is short."""
        kept = self._kept.pop((session, request), None)
        if kept is not None:
            self._bytes -= kept.nbytes
            kept.frames = None

    def close(self, session: bytes) -> None:
        """Forget a session."""
        for request in self._replies.pop(session, ()):
            self.give_up(session, request)
