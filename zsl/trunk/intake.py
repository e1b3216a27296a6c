"""From a FORWARD or BACKWARD message to a request that can be queued: checked, counted, and not the second of its kind.

Knows no socket and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zsl.errors import DrainingError, ForwardOnlyError, MalformedError
from zsl.trunk.admission import check_backward, check_forward, sharing_of
from zsl.trunk.replies import Replies, asked_by
from zsl.trunk.scheduler import Job
from zsl.trunk.sessions import Session, Sessions
from zsl.trunk.settings import TrunkInfo, TrunkTraits
from zsl.trunk.work import Alone, Buffers, Held, Kind, Shape, Sharing
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward, Limits, WorkHeader


@dataclass(frozen=True, slots=True)
class Request:
    """An admitted request on its way: what to compute, and whom to answer."""

    session: Session
    header: WorkHeader
    kind: Kind
    buffers: Buffers
    shape: Shape
    sharing: Sharing
    keep: bool
    held: Held | None
    arrived: float
    job: Job

    @property
    def taken_bytes(self) -> int:
        """The memory of what was held for it, and is counted for no session any more."""
        return 0 if self.held is None else self.held.stash.nbytes

    def is_asked_by(self, header: WorkHeader, frames: Sequence[Frame]) -> bool:
        """Whether a message of its id asks for the same. (A backward may bring its activations along, or not.)"""
        arrived = {d.role: frame for d, frame in zip(header.tensors, frames, strict=True)}
        return asked_by(self.header) == asked_by(header) and all(
            self.buffers[role][1] == frame for role, frame in arrived.items() if role in self.buffers
        )


class Intake:
    """Takes requests in for a trunk, and remembers what of them is under way."""

    def __init__(
        self, info: TrunkInfo, limits: Limits, traits: TrunkTraits, sessions: Sessions, replies: Replies
    ) -> None:
        self._info = info
        self._limits = limits
        self._traits = traits
        self._sessions = sessions
        self._replies = replies
        self.under_way: dict[tuple[bytes, int], Request] = {}

    def came_before(self, session: Session, header: WorkHeader, frames: Sequence[Frame]) -> bool:
        """Whether nothing is to be computed for a request that was delivered again; its answer may be in the replies.

        Raises `MalformedError` if its id was used for another one.
        """
        under_way = self.under_way.get((session.id, header.request))
        if under_way is not None:
            if not under_way.is_asked_by(header, frames):
                raise MalformedError("this request id is in use for another request")
            return True  # the one answer will serve, on the connection that is open then
        if not self._replies.answered(session.id, header):
            return False
        # Who asks again has not got the answer; if it is not kept any more, the first attempt can only be an echo.
        return header.attempt == 0 or self._replies.frames(session.id, header.request) is not None

    def admit(
        self,
        session: Session,
        header: WorkHeader,
        frames: Sequence[Frame],
        now: float,
        *,
        draining: bool,
        unsent: Callable[[bytes], int],
        all_unsent: int,
        retry_after_ms: int,
    ) -> Request:
        """Check a request against what the trunk takes, and count it. Raises `WireError`."""
        buffers: Buffers = {d.role: (d, frame) for d, frame in zip(header.tensors, frames, strict=True)}
        hidden_size = self._info.model.hidden_size
        held = None
        if isinstance(header, Forward):
            if draining:
                raise DrainingError()
            if header.keep and self._info.forward_only:
                raise ForwardOnlyError()
            kind, keep = Kind.FORWARD, header.keep
            shape = check_forward(buffers, hidden_size, self._limits)
            cost = self._traits.costs.forward
        else:
            assert isinstance(header, Backward)
            if self._info.forward_only:
                raise ForwardOnlyError()
            kind, keep = Kind.BACKWARD, False
            complete = "activations" in buffers
            held = None if complete else session.held.get(header.step)
            shape = check_backward(buffers, held.shape if held else None, hidden_size, self._limits)
            cost = self._traits.costs.backward
        sharing = held.sharing if held else sharing_of(buffers, shape, self._traits)
        nbytes = sum(descriptor.nbytes for descriptor in header.tensors)
        self._sessions.admit(
            session,
            header.request,
            nbytes,
            unsent=unsent,
            all_unsent=all_unsent,
            retry_after_ms=retry_after_ms,
        )
        if isinstance(header, Backward):
            if held is None:
                self._sessions.give_up(session, header.step)
            else:
                self._sessions.take(session, header.step)
            self._replies.arrived(session.id, header.step)
        job = Job(
            (session.id, header.request),
            tenant=session.owner,
            client=session.id,
            kind=kind,
            tokens=shape.total_tokens,
            merge_key=None if sharing == Alone() else sharing,
            cost_seconds=cost.seconds(shape.total_tokens),
            deadline=now + header.budget_ms / 1000,
        )
        request = Request(session, header, kind, buffers, shape, sharing, keep, held, now, job)
        self.under_way[session.id, header.request] = request
        return request
