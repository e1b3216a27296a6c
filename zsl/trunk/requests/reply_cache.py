"""Reply cache: recent answers by request id, so that a repeated request is not computed twice.

Delivery is at least once: a client that lost its connection repeats a request with the same id. Answered ids are
remembered for a while, and their answers while there is memory. Losing one costs only time: a forward is computed
again, and a backward without its step is sent again with its activations. Pure: no sockets, no clock.
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
# Overhead beside the bytes of frames: 520 bytes on Linux for a remembered request, 1,340 for an answer.
REQUEST_BYTES, ANSWER_BYTES = 640, 1536

_Key = tuple[bytes, int]  # session and request


def asked_by(header: Forward | Backward) -> bytes:
    """Return a digest that is equal for all deliveries of a request: with or without activations for a backward."""
    tensors = [(d.role, d.dtype, d.shape) for d in header.tensors]
    asked: object
    match header:
        case Backward():
            gradients = [one for one in tensors if one[0].endswith("gradients")]
            asked = "backward", header.step, gradients, header.adapter, header.adapter_sum, header.adapter_gradients
        case Forward():
            asked = "forward", header.keep, tensors, header.adapter, header.reveal, header.cache
    return xxhash.xxh3_128_digest(repr(asked).encode())


@dataclass(slots=True)
class Reply:
    """An answered request. `asked`: its digest. `frames` None: the answer was evicted."""

    asked: bytes
    frames: Sequence[Frame] | None
    nbytes: int


class ReplyCache:
    """Answered requests by session, and the newest answers.

    Together they use up to `max_bytes`; over it, the oldest answers are evicted first, then the oldest requests.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._replies: OrderedDict[_Key, Reply] = OrderedDict()  # oldest first, as in the two below
        self._kept: OrderedDict[_Key, Reply] = OrderedDict()  # those with frames
        self._of_session: dict[bytes, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes used by requests and answers."""
        return self._nbytes

    def put(self, session: bytes, header: Forward | Backward, frames: Sequence[Frame]) -> None:
        """Store the answer to a request."""
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
        """Return the reply to this request, or None. Raises `MalformedError` if its id belonged to another request."""
        reply = self._replies.get((session, header.request))
        if reply is not None and reply.asked != asked_by(header):
            raise MalformedError("this request id was used for another request")
        return reply

    def give_up(self, session: bytes, request: int) -> None:
        """Drop the frames of an answer: the client has received them, or memory is short."""
        kept = self._kept.pop((session, request), None)
        if kept is not None:
            self._nbytes -= kept.nbytes
            kept.frames = None

    def close(self, session: bytes) -> None:
        """Forget the requests and answers of a session."""
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
