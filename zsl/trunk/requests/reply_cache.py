"""A cache of answers, for requests that come again: delivery is at least once, so each is computed once.

A client that lost its connection asks again with the same request id. Answered ids are remembered for a while, and
their answers while there is memory. Losing one costs time only: a forward is computed again, and the client sends a
backward whose step is gone again in full. Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from zsl.errors import MalformedError
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward

REMEMBERED_PER_SESSION = 256  # requests
# Memory beside the bytes of frames: 520 bytes on Linux for a request that is remembered, 1,340 for an answer.
REQUEST_BYTES, ANSWER_BYTES = 640, 1536

_Key = tuple[bytes, int]  # session and request


def asked_by(header: Forward | Backward) -> bytes:
    """Digest a request: equal for two deliveries of it. (A backward may bring its activations along, or not.)"""
    tensors = [(d.role, d.dtype, d.shape) for d in header.tensors]
    asked: object
    match header:
        case Backward():
            asked = "backward", header.step, next((one for one in tensors if one[0] == "gradients"), None)
        case Forward():
            asked = "forward", header.keep, tensors
    return xxhash.xxh3_128_digest(repr(asked).encode())


@dataclass(slots=True)
class Reply:
    """One answered request. `frames` None: the answer itself was given up."""

    asked: bytes
    frames: Sequence[Frame] | None
    nbytes: int


class ReplyCache:
    """The requests that were answered, by session, and the newest answers.

    All of it takes up to `max_bytes`: over that, the oldest answers go first, then the oldest requests.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._replies: OrderedDict[_Key, Reply] = OrderedDict()  # oldest first, as all of these
        self._kept: OrderedDict[_Key, Reply] = OrderedDict()  # those with frames
        self._of_session: dict[bytes, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """The memory that all of it takes."""
        return self._nbytes

    def put(self, session: bytes, header: Forward | Backward, frames: Sequence[Frame]) -> None:
        """Remember that a request was answered with these frames."""
        key = session, header.request
        self._forget(key)
        of_session = self._of_session.setdefault(session, OrderedDict())
        reply = Reply(asked_by(header), frames, ANSWER_BYTES + sum(len(frame) for frame in frames))
        self._replies[key] = self._kept[key] = reply
        of_session[header.request] = None
        self._nbytes += REQUEST_BYTES + reply.nbytes
        if len(of_session) > REMEMBERED_PER_SESSION:
            self._forget((session, next(iter(of_session))))
        while self._nbytes > self._max_bytes:
            if self._kept:
                self.give_up(*next(iter(self._kept)))
            else:
                self._forget(next(iter(self._replies)))

    def get(self, session: bytes, header: Forward | Backward) -> Reply | None:
        """Find the reply to this request. Raises `MalformedError` if its id was that of another one."""
        reply = self._replies.get((session, header.request))
        if reply is not None and reply.asked != asked_by(header):
            raise MalformedError("this request id was used for another request")
        return reply

    def give_up(self, session: bytes, request: int) -> None:
        """Drop the frames of an answer: its client has them, or memory is short."""
        kept = self._kept.pop((session, request), None)
        if kept is not None:
            self._nbytes -= kept.nbytes
            kept.frames = None

    def close(self, session: bytes) -> None:
        """Forget a session."""
        for request in list(self._of_session.get(session, ())):
            self._forget((session, request))

    def _forget(self, key: _Key) -> None:
        session, request = key
        self.give_up(session, request)
        if self._replies.pop(key, None) is not None:
            self._nbytes -= REQUEST_BYTES
            of_session = self._of_session[session]
            del of_session[request]
            if not of_session:
                del self._of_session[session]
