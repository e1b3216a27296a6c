"""Answers that were given, for requests that come again: delivery is at least once, so each is computed once.

A client that lost its connection asks again with the same request id. What was answered is remembered for a while, and
the answer itself while there is memory. Losing it costs time only: a forward is computed again, and a backward that
has nothing to go by any more is asked again in full. Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from zsl.errors import MalformedError
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward, WorkHeader

REMEMBERED_PER_SESSION = 256  # requests
# Memory beside the bytes of frames: 520 bytes on Linux for a request that is remembered, 1,340 for an answer.
REQUEST_BYTES, ANSWER_BYTES = 640, 1536

_Key = tuple[bytes, int]  # session and request


def asked_by(header: WorkHeader) -> bytes:
    """Digest of what two deliveries of one request have in common. (A backward may bring its activations along.)"""
    tensors = [(d.role, d.dtype, d.shape) for d in header.tensors]
    if isinstance(header, Backward):
        asked: object = "backward", header.step, next((one for one in tensors if one[0] == "gradients"), None)
    else:
        assert isinstance(header, Forward)
        asked = "forward", header.keep, tensors
    return xxhash.xxh3_128_digest(repr(asked).encode())


@dataclass(slots=True)
class _Answered:
    asked: bytes
    frames: Sequence[Frame] | None  # None: given up
    nbytes: int


class Replies:
    """The requests that were answered, by session, and the newest answers.

    All of it takes up to `max_bytes`: over that, the oldest answers go first, then the oldest requests.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._answered: OrderedDict[_Key, _Answered] = OrderedDict()  # oldest first, as all of these
        self._kept: OrderedDict[_Key, _Answered] = OrderedDict()  # those with frames
        self._of_session: dict[bytes, OrderedDict[int, None]] = {}

    @property
    def nbytes(self) -> int:
        """The memory that all of it takes."""
        return self._nbytes

    def put(self, session: bytes, header: WorkHeader, frames: Sequence[Frame]) -> None:
        """A request was answered with these frames."""
        key = session, header.request
        self.forget(*key)
        of_session = self._of_session.setdefault(session, OrderedDict())
        answered = _Answered(asked_by(header), frames, ANSWER_BYTES + sum(len(frame) for frame in frames))
        self._answered[key] = self._kept[key] = answered
        of_session[header.request] = None
        self._nbytes += REQUEST_BYTES + answered.nbytes
        if len(of_session) > REMEMBERED_PER_SESSION:
            self.forget(session, next(iter(of_session)))
        while self._nbytes > self._max_bytes:
            if self._kept:
                self._give_up(next(iter(self._kept)))
            else:
                self.forget(*next(iter(self._answered)))

    def answered(self, session: bytes, header: WorkHeader) -> bool:
        """Whether this request was answered before. Raises `MalformedError` if its id was that of another one."""
        found = self._answered.get((session, header.request))
        if found is not None and found.asked != asked_by(header):
            raise MalformedError("this request id was used for another request")
        return found is not None

    def frames(self, session: bytes, request: int) -> Sequence[Frame] | None:
        """The answer that was given, if it is still kept."""
        kept = self._kept.get((session, request))
        return None if kept is None else kept.frames

    def arrived(self, session: bytes, request: int) -> None:
        """The client has this answer: it asks for what follows from it."""
        self._give_up((session, request))

    def forget(self, session: bytes, request: int) -> None:
        """Take a request as new when it comes again."""
        self._give_up((session, request))
        if self._answered.pop((session, request), None) is not None:
            self._nbytes -= REQUEST_BYTES
            of_session = self._of_session[session]
            del of_session[request]
            if not of_session:
                del self._of_session[session]

    def close(self, session: bytes) -> None:
        """The session is over."""
        for request in list(self._of_session.get(session, ())):
            self.forget(session, request)

    def _give_up(self, key: _Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._nbytes -= kept.nbytes
            kept.frames = None
