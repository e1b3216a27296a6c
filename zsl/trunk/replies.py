"""Answers that were given, for requests that come again: delivery is at least once, so each is computed once.

A client that lost its connection asks again with the same request id. What was answered is remembered for a while, and
the answer itself while there is memory. Losing it costs time only: a forward is computed again, and a backward that
has nothing to go by any more is asked again in full. Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from zsl.errors import MalformedError
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward, WorkHeader

REMEMBERED_PER_SESSION = 256  # requests

_Asked = tuple[object, ...]


def asked_by(header: WorkHeader) -> _Asked:
    """What two deliveries of one request have in common. (A backward may bring its activations along, or not.)"""
    if isinstance(header, Backward):
        return "backward", header.step, next((d for d in header.tensors if d.role == "gradients"), None)
    assert isinstance(header, Forward)
    return "forward", header.keep, *header.tensors


@dataclass(slots=True)
class _Answered:
    asked: _Asked
    frames: Sequence[Frame] | None  # None: given up
    nbytes: int


class Replies:
    """The requests that were answered, by session, and the newest answers, up to `max_bytes` of all sessions."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answered: dict[bytes, OrderedDict[int, _Answered]] = {}
        self._kept: OrderedDict[tuple[bytes, int], _Answered] = OrderedDict()  # those with frames, oldest first

    def put(self, session: bytes, header: WorkHeader, frames: Sequence[Frame]) -> None:
        """A request was answered with these frames."""
        of_session = self._answered.setdefault(session, OrderedDict())
        self.forget(session, header.request)
        answered = _Answered(asked_by(header), frames, sum(len(frame) for frame in frames))
        of_session[header.request] = self._kept[session, header.request] = answered
        self._bytes += answered.nbytes
        if len(of_session) > REMEMBERED_PER_SESSION:
            self._give_up(session, next(iter(of_session)))
            of_session.popitem(last=False)
        while self._bytes > self._max_bytes:
            self._give_up(*next(iter(self._kept)))

    def answered(self, session: bytes, header: WorkHeader) -> bool:
        """Whether this request was answered before. Raises `MalformedError` if its id was that of another one."""
        found = self._answered.get(session, OrderedDict()).get(header.request)
        if found is not None and found.asked != asked_by(header):
            raise MalformedError("this request id was used for another request")
        return found is not None

    def frames(self, session: bytes, request: int) -> Sequence[Frame] | None:
        """The answer that was given, if it is still kept."""
        kept = self._kept.get((session, request))
        return None if kept is None else kept.frames

    def arrived(self, session: bytes, request: int) -> None:
        """The client has this answer: it asks for what follows from it."""
        self._give_up(session, request)

    def forget(self, session: bytes, request: int) -> None:
        """Take a request as new when it comes again."""
        self._give_up(session, request)
        self._answered.get(session, OrderedDict()).pop(request, None)

    def close(self, session: bytes) -> None:
        """The session is over."""
        for request in self._answered.pop(session, ()):
            self._give_up(session, request)

    def _give_up(self, session: bytes, request: int) -> None:
        kept = self._kept.pop((session, request), None)
        if kept is not None:
            self._bytes -= kept.nbytes
            kept.frames = None
