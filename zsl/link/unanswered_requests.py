"""Queue of a connection's unanswered requests: waiting to be sent, or sent.

Each ends with its answer, or with a typed error at its deadline or after too many daemons were lost while they had it.
The trunk is a pure function, so sending again is safe: the answer is the same. No sockets; the clock is an argument.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from numbers import Real

from zsl.errors import CancelledByClientError, ConfigError, ConnectionLost
from zsl.link.adapter_versions import EncodedAdapter
from zsl.wire.frames import Frame, Message
from zsl.wire.messages import Header, Limits, Welcome

# Daemon processes. Bounded, so that a request that crashes daemons does not crash them all. (Lost connections do not
# count: the deadline ends those.)
MAX_LIVES = 5
REMEMBERED_CANCELS = 64
MAX_REFUSALS = 5  # of one request, by daemons that ask for it complete
LARGEST_ATTEMPT = 255
MAX_BUDGET_SECONDS = 7 * 24 * 3600.0  # the protocol's maximum
SHORTEST_RETRY_SECONDS = 0.01  # before a request is sent again, even if the daemon allows it at once


def check_timeouts(**seconds_by_name: float) -> None:
    """Check timeouts in seconds. Raises `ConfigError` with the name of the invalid argument."""
    for name, seconds in seconds_by_name.items():
        if not isinstance(seconds, Real) or not 0 < seconds <= MAX_BUDGET_SECONDS:
            raise ConfigError(f"{name} {seconds!r}: a number of seconds above 0, at most {MAX_BUDGET_SECONDS:.0f}")


Build = Callable[[Welcome, "Pending"], tuple[Header, Sequence[Frame]]]


@dataclass(slots=True)
class Pending:
    """Unanswered request. `build` makes its message for the session that is open when it is sent.

    `adapter`: the version that it runs with, sent before it to a session that lacks it.
    """

    request: int
    build: Build
    deadline: float
    nbytes: int
    adapter: EncodedAdapter | None = None
    future: Future[Message] = field(default_factory=Future)
    attempt: int = 0
    complete: bool = False  # include everything that the request needs
    in_session: bool = True  # of the sent message: its answer names the session
    not_before: float = 0.0
    refusals: int = 0
    sent_to: set[bytes] = field(default_factory=set)  # epochs of daemon processes
    adapter_bytes: int = 0  # sent before the message
    message: int = 0  # its number among those that name adapters

    def budget_ms(self) -> int:
        return max(1, round(min(self.deadline - time.monotonic(), MAX_BUDGET_SECONDS) * 1000))

    def fail(self, error: BaseException) -> None:
        """End the request with an error, unless it was cancelled or has ended."""
        if not self.future.running() and not self.future.set_running_or_notify_cancel():
            return
        if not self.future.done():
            self.future.set_exception(error)


class Requests:
    """Unanswered requests, in the order of their ids unless noted otherwise."""

    def __init__(self) -> None:
        self._open: dict[int, Pending] = {}  # all, so that none is lost if a move between the other two is interrupted
        self._waiting: deque[Pending] = deque()
        self._sent: dict[int, Pending] = {}
        self.replays = 0  # requests that were sent again
        self._cancelled: deque[int] = deque(maxlen=REMEMBERED_CANCELS)  # ids that were unknown when they were

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sent)

    @property
    def under_way(self) -> Set[int]:
        """Ids of sent requests without an answer."""
        return self._sent.keys()

    @property
    def under_way_bytes(self) -> int:
        """Bytes of their tensors, which the daemon's limit is for."""
        return sum(pending.nbytes for pending in self._sent.values())

    @property
    def transferred_bytes(self) -> int:
        """Bytes of their tensors and of the adapters sent before them."""
        return self.under_way_bytes + sum(pending.adapter_bytes for pending in self._sent.values())

    def add(self, pending: Pending) -> None:
        """Queue a request, unless it is queued already, or cancelled."""
        request, still_open = pending.request, self._open
        if request in still_open or pending.future.done():
            return
        if request in self._cancelled:
            pending.fail(CancelledByClientError())
            return
        still_open[request] = pending
        self._waiting.append(pending)
        pending.future.add_done_callback(lambda _: still_open.pop(request, None))

    def take_next(self, limits: Limits, epoch: bytes, now: float) -> Pending | None:
        """Return the next request that may be sent to this daemon process now: within its limits, and due."""
        if not self._waiting:
            return None
        under_way_bytes = self.under_way_bytes
        for pending in list(self._waiting):
            if len(self._sent) >= limits.max_inflight_requests:
                return None
            if pending.not_before > now:
                continue
            if self._sent and under_way_bytes + pending.nbytes > limits.max_inflight_bytes:
                return None  # smaller ones must not overtake it for ever
            self._waiting.remove(pending)
            if not pending.future.running() and not pending.future.set_running_or_notify_cancel():
                continue
            pending.sent_to.add(epoch)
            if len(pending.sent_to) > MAX_LIVES:
                pending.fail(ConnectionLost(f"{MAX_LIVES} daemons were lost while they had this request"))
                continue
            self._sent[pending.request] = pending
            return pending
        return None

    def names_no_session(self, request: int | None) -> bool:
        """Return whether a sent request's answer cannot name the session: a STATUS."""
        pending = None if request is None else self._sent.get(request)
        return pending is not None and not pending.in_session

    def ended(self, request: int | None) -> Pending | None:
        """Remove and return a sent request; None if unknown."""
        return None if request is None else self._sent.pop(request, None)

    def give_up(self, request: int) -> tuple[Pending, bool] | None:
        """Remove and return a request, and whether it was sent; None if unknown: then it is not queued later."""
        if (sent := self._sent.pop(request, None)) is not None:
            return sent, True
        for pending in self._waiting:
            if pending.request == request:
                self._waiting.remove(pending)
                return pending, False
        self._cancelled.append(request)
        return None

    def refused(self, pending: Pending, error: Exception) -> None:
        """Send a request again, complete, as the daemon asked; fail it after too many refusals."""
        pending.refusals += 1
        if pending.refusals > MAX_REFUSALS:
            pending.fail(error)
        else:
            self._again(pending)

    def all_again(self) -> None:
        """Queue all sent requests to be sent again, in order."""
        in_order = sorted(self._sent.values(), key=lambda pending: pending.request)
        self._sent.clear()
        for pending in reversed(in_order):
            self._again(pending)

    def start_over(self) -> None:
        """Queue all unanswered requests again, in order, after an interrupt that may have left one half moved."""
        self._sent.clear()
        self._waiting.clear()
        for pending in sorted(self._open.copy().values(), key=lambda one: one.request, reverse=True):
            if pending.future.done():
                self._open.pop(pending.request, None)
            else:
                self._again(pending)

    def _again(self, pending: Pending) -> None:
        """Queue a request to be sent again, complete, before the others."""
        pending.attempt = min(pending.attempt + 1, LARGEST_ATTEMPT)
        pending.complete = True
        self.replays += 1
        self._waiting.appendleft(pending)

    def later(self, pending: Pending, not_before: float, now: float) -> None:
        """Queue a request to be sent again at `not_before`. Does not count as another attempt."""
        pending.not_before = max(not_before, now + SHORTEST_RETRY_SECONDS)
        self._waiting.append(pending)

    def expired(self, now: float) -> list[tuple[Pending, bool]]:
        """Remove and return the requests whose deadline has passed, and whether each was sent."""
        expired = [(pending, True) for pending in self._sent.values() if pending.deadline <= now]
        expired += [(pending, False) for pending in self._waiting if pending.deadline <= now]
        for pending, sent in expired:
            if sent:
                del self._sent[pending.request]
            else:
                self._waiting.remove(pending)
        return expired

    def times(self, now: float) -> list[float]:
        """Return the deadlines and the times before which a request may not be sent."""
        times = [pending.deadline for pending in (*self._sent.values(), *self._waiting)]
        return times + [pending.not_before for pending in self._waiting if pending.not_before > now]

    def fail_all(self, error: Exception) -> None:
        for pending in self._open.copy().values():
            pending.fail(copy(error))  # a copy for each, whose traceback has its own frames
