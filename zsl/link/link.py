"""State machine of a connection: opens it again when it is lost, and sends unanswered requests again.

Transitions between `Pausing`, `Opening` and `Open`.

When the connection is lost, or the daemon is silent or restarted, the link opens a fresh socket to the same daemon or
the next of the list. It resumes the session if the daemon still has it, else opens a new one, and sends unanswered
requests again, each complete in itself. The new session must be with the same trunk.

Not thread-safe. Imports no torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Set
from concurrent.futures import Future

import zmq

from zsl.errors import CancelledByClientError, ConnectionLost, ZslError
from zsl.link.endpoints import LONGEST_PAUSE_SECONDS, Endpoints
from zsl.link.lost_connections import LostConnections
from zsl.link.open_session import Open
from zsl.link.opening import Opening
from zsl.link.states import (
    Event,
    Failed,
    FirstSession,
    Interrupted,
    Left,
    Lost,
    PauseOver,
    Pausing,
    Shared,
    State,
    Unfit,
    Welcomed,
)
from zsl.link.traffic import Traffic
from zsl.link.unanswered_requests import Pending
from zsl.transport.curve_keys import ClientKeys
from zsl.wire.messages import Hello, Welcome

logger = logging.getLogger(__name__)


class Link:
    """Link to a daemon. Call `wait` and `turn` in a loop until `close`. `opened` gets the first WELCOME."""

    def __init__(
        self,
        endpoints: tuple[str, ...],
        hello: Hello,
        *,
        keys: ClientKeys | None,
        opened: Future[Welcome],
        new_request_id: Callable[[], int],
        connect_timeout_seconds: float,
        request_timeout_seconds: float,
    ) -> None:
        # Several attempts within the timeout of one request.
        pause_seconds = min(LONGEST_PAUSE_SECONDS, request_timeout_seconds / 4)
        self._shared = Shared(
            endpoints=Endpoints(endpoints, longest_pause_seconds=pause_seconds),
            hello=hello,
            keys=keys,
            new_request_id=new_request_id,
            connect_timeout_seconds=connect_timeout_seconds,
            request_timeout_seconds=request_timeout_seconds,
            first=FirstSession(opened, open_by=time.monotonic() + connect_timeout_seconds),
        )
        self._reconnects = LostConnections()
        self._state: State = Pausing(0.0)
        self._poller: zmq.Poller | None = None
        self._polled: tuple[zmq.Socket[bytes], ...] = ()
        self._readable: Set[object] | None = None  # found by `wait` since the last turn; None: not known

    @property
    def state(self) -> State:
        """Current state; its `repr` is readable."""
        return self._state

    @property
    def reconnects(self) -> int:
        """Number of lost connections."""
        return self._reconnects.count

    @property
    def traffic(self) -> Traffic:
        """Messages and bytes sent and received so far."""
        return self._shared.traffic.so_far(self._shared.requests.replays)

    @property
    def busy(self) -> bool:
        """True if a request has no answer yet, or no session is open."""
        return not isinstance(self._state, Open) or len(self._shared.requests) > 0

    def add(self, pending: Pending) -> None:
        """Queue a request."""
        self._shared.requests.add(pending)

    def release(self, step: int, session: bytes) -> None:
        """Send RELEASE, now or when the session is resumed; ignore a step of an older session."""
        if self._shared.last.release(step, session) and isinstance(self._state, Open):
            self._state.release(step)

    def cancel(self, request: int) -> None:
        """End a request with `CancelledByClientError`, and tell the daemon, which drops it if it has not begun."""
        found = self._shared.requests.give_up(request)
        if found is None:
            return
        pending, sent = found
        if sent and isinstance(self._state, Open):
            self._state.cancel(request)
        pending.fail(CancelledByClientError())

    def wait(self, wake: int) -> bool:
        """Sleep until something arrives, the file descriptor `wake` is readable, or a timer is due. Return whether
        `wake` is readable."""
        sockets = self._state.sockets
        if self._poller is None or sockets is not self._polled:
            poller = zmq.Poller()
            for readable in (wake, *sockets):
                poller.register(readable, zmq.POLLIN)
            self._poller, self._polled = None, sockets
            self._poller = poller  # set when complete, because Ctrl-C may come before
        ready = self._poller.poll(max(0, math.ceil(self._seconds_to_next_timer() * 1000)))
        self._readable = {readable for readable, _ in ready}
        return wake in self._readable

    def turn(self, *, receives: bool = True) -> None:
        """Handle received messages and due timers, and send waiting requests. `receives`: False leaves what has come
        to the next turn, after a `wait`.

        Raises `ZslError` when the connection cannot go on.
        """
        found, self._readable = self._readable, None
        readable: Set[object] = frozenset(self._state.sockets if found is None else found) if receives else frozenset()
        while (event := self._state.receive(readable)) is not None:
            self._end(event)
        now = time.monotonic()
        self._check_deadlines(now)
        if not isinstance(self._state, Open) and not (first := self._shared.first).is_open and now >= first.open_by:
            raise first.not_yet or self._shared.endpoints.unreachable(self._shared.connect_timeout_seconds)
        if (event := self._state.act(now, readable)) is not None:
            self._end(event)

    def start_over(self) -> None:
        """Open a fresh socket and send unanswered requests again, after Ctrl-C interrupted a `turn`."""
        logger.warning("%s: interrupted; connecting again", self._shared.endpoints.current)
        self._shared.requests.start_over()
        self._end(Interrupted())

    def close(self, error: ZslError, *, say_bye: bool = True) -> None:
        """Send BYE, fail unanswered requests with `error`, and free the sockets."""
        if not self._shared.first.is_open:
            self._shared.first.opened.set_exception(error)
        self._shared.requests.fail_all(error)
        if say_bye:
            self._state.leave()
        else:
            self._state.close()  # a message may be half sent
        self._shared.context.destroy()  # also sockets that an interrupted step left unreferenced

    # --- transitions -------------------------------------------------------------------------------------------

    def _end(self, event: Event) -> None:
        """End the state with an event, and enter the next one. Raises `ZslError` if no endpoint is left."""
        ended = self._state
        self._state = self._next(ended, event, time.monotonic())
        if isinstance(ended, Open):
            self._shared.requests.all_again()
        if isinstance(event, Left):
            ended.leave()
        elif not isinstance(event, Welcomed):  # the next state takes over its socket
            ended.close()

    def _next(self, state: State, event: Event, now: float) -> State:
        endpoints, endpoint = self._shared.endpoints, self._shared.endpoints.current
        match event:
            case Welcomed(welcome=welcome):
                assert isinstance(state, Opening)
                return self._open(state, welcome, now)
            case Lost(why=why):
                assert isinstance(state, Open)
                self._log_lost(endpoint, why, now)
                if not state.heard:
                    return self._next(state, Failed(why), now)
                endpoints.lost(now)
                return Opening(self._shared, now) if endpoints.not_before <= now else Pausing(endpoints.not_before)
            case Failed(why=why):
                if self._shared.first.is_open:
                    said = self._reconnects.failed(why or endpoints.reason(endpoint), now)
                    if said is not None:
                        logger.warning("%s: %s; trying on", endpoint, said)
                endpoints.failed(now)
                return Pausing(endpoints.not_before)
            case Unfit(error=error):
                endpoints.strike_out(error)
                logger.warning("%s is left out from now on: %s", endpoint, error)
                return Opening(self._shared, now)
            case Left():
                endpoints.leave(now)
                logger.warning("going on with the trunk at %s", endpoints.current)
                return Opening(self._shared, now)
            case PauseOver() | Interrupted():
                return Opening(self._shared, now)

    def _open(self, opening: Opening, welcome: Welcome, now: float) -> State:
        endpoint, first = self._shared.endpoints.current, self._shared.first
        if not first.is_open:
            first.opened.set_result(welcome)
        self._shared.endpoints.opened(now)
        first.not_yet = None
        if self._reconnects.opened():
            logger.warning("the trunk at %s answers", endpoint)
        return Open(self._shared, opening.dealer, welcome, now)

    def _log_lost(self, endpoint: str, why: str, now: float) -> None:
        said = self._reconnects.lost(why, now)
        if said is not None:
            logger.warning(
                "%s: %s; connecting again (a request waits for up to %.0f s)",
                endpoint,
                said,
                self._shared.request_timeout_seconds,
            )

    # --- time --------------------------------------------------------------------------------------------------

    def _seconds_to_next_timer(self) -> float:
        now = time.monotonic()
        times = [*self._shared.requests.times(now), *self._state.due(now)]
        if not isinstance(self._state, Open) and not self._shared.first.is_open:
            times.append(self._shared.first.open_by)
        return min(times) - now

    def _check_deadlines(self, now: float) -> None:
        state = self._state
        for pending, sent in self._shared.requests.expired(now):
            if not isinstance(state, Open):
                to, seconds = self._shared.endpoints.current, f"{self._shared.request_timeout_seconds:g} s"
                pending.fail(ConnectionLost(f"the connection to {to} was lost and did not come back in {seconds}"))
                continue
            if sent:
                state.cancel(pending.request)
            pending.fail(state.timeout())
