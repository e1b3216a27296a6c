"""A connection to a trunk daemon: one I/O thread owns the socket, any thread submits and waits on futures.

Every request has a deadline, and ends with its answer or a typed error. When the connection is lost, or the daemon
was started anew, the thread takes a fresh socket, opens a new session and sends what was unanswered once more,
complete in itself: the trunk is a pure function, so the answer is the same. Knows no torch.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

import zmq

import zsl
from zsl.errors import (
    WIRE_ERRORS,
    ClosedError,
    ConnectionLost,
    InternalError,
    RequestTimeout,
    Retry,
    TooLargeError,
    TrunkUnreachable,
    WireError,
    ZslError,
)
from zsl.transport.dealer import Dealer, LinkEvent, normalized_endpoint
from zsl.wire.frames import Frame, Message, decode, encode
from zsl.wire.messages import (
    TO_CLIENT,
    Bye,
    Cancel,
    Cut,
    Error,
    FloatDtypeName,
    GoAway,
    Header,
    Hello,
    ModelIdentity,
    Ping,
    Pong,
    Release,
    StatusRequest,
    Welcome,
)

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # a request is sent, and replayed once
SILENT_PINGS = 5  # a daemon that misses so many signs of life is taken for dead
WAIT_GRACE_SECONDS = 5.0  # a waiter outlasts the I/O thread's own deadline by this much

Build = Callable[["Welcome", "Pending"], tuple[Header, Sequence[Frame]]]


@dataclass(slots=True)
class Pending:
    """A request without an answer. `build` makes its message for the session that is open when it is sent."""

    request: int
    build: Build
    deadline: float
    future: Future[Message] = field(default_factory=Future)
    attempt: int = 0
    complete: bool = False  # send along everything that the request needs
    not_before: float = 0.0
    nbytes: int = 0

    def budget_ms(self) -> int:
        return max(1, round((self.deadline - time.monotonic()) * 1000))


class Connection:
    """A session with the daemon at `endpoint`, kept alive until `close`."""

    def __init__(self, endpoint: str, *, connect_timeout_seconds: float, request_timeout_seconds: float) -> None:
        self.endpoint = normalized_endpoint(endpoint)
        self._connect_timeout_seconds = connect_timeout_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self._pid = os.getpid()
        # Reentrant: a finalizer may run `release` in the middle of anything, also of this thread's own `submit`.
        self._lock = threading.RLock()
        self._commands: deque[Callable[[], None]] = deque()
        self._ids = count(1)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._opened: Future[Welcome] = Future()
        self._closing = False
        self._ended = False  # the wake pipe is closed, no command is taken any more
        # What follows belongs to the I/O thread.
        self._hello: tuple[ModelIdentity | None, Cut | None, FloatDtypeName] = (None, None, "f32")
        self._dealer: Dealer | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._poller = zmq.Poller()
        self._welcome: Welcome | None = None
        self._hello_request: int | None = None
        self._hello_deadline = 0.0
        self._refused = False
        self._waiting: deque[Pending] = deque()
        self._sent: dict[int, Pending] = {}
        self._last_heard = self._last_ping = 0.0

    # --- from any thread ---------------------------------------------------------------------------------------

    def open(self, model: ModelIdentity | None, cut: Cut | None, dtype: FloatDtypeName) -> Welcome:
        """Open the session, and wait for the daemon's WELCOME.

        Raises `TrunkUnreachable`, `WrongModelError` or another `WireError`.
        """
        self._check_usable()
        if self._thread is None:
            self._hello = (model, cut, dtype)
            self._thread = threading.Thread(target=self._run, name="zsl-io", daemon=True)
            self._thread.start()
        return self._opened.result(self._connect_timeout_seconds + WAIT_GRACE_SECONDS)

    @property
    def welcome(self) -> Welcome:
        """What the daemon said when the first session was opened."""
        return self._opened.result(0)

    def new_request_id(self) -> int:
        """An id that this connection has not used, larger than all before it."""
        return next(self._ids)

    def submit(self, request: int, build: Build, *, nbytes: int = 0) -> Future[Message]:
        """Send a request; the future brings the RESULT (or STATUS), or raises a `ZslError`."""
        self._check_usable()
        pending = Pending(request, build, time.monotonic() + self.request_timeout_seconds, nbytes=nbytes)
        if not self._command(lambda: self._waiting.append(pending)):
            self._check_usable()
        return pending.future

    def submit_status(self) -> Future[Message]:
        """Ask what the daemon serves."""
        request = self.new_request_id()
        return self.submit(request, lambda welcome, pending: (StatusRequest(request=request), ()))

    def release(self, step: int, session: bytes) -> None:
        """Tell the daemon that no backward will come for this step. Never raises: it may run in a finalizer."""
        if os.getpid() == self._pid:
            self._command(lambda: self._say_release(step, session))

    def wait(self, future: Future[Message]) -> Message:
        """The future's result; the wait is bounded even if the I/O thread were gone."""
        try:
            return future.result(self.request_timeout_seconds + WAIT_GRACE_SECONDS)
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """End the session and the thread. Requests without an answer end with `ClosedError`."""
        if os.getpid() != self._pid or self._closing:
            return
        self._closing = True
        self._command(lambda: None)
        if self._thread is threading.current_thread():
            return  # a finalizer that ran here; the thread's own loop ends it
        if self._thread is not None:
            self._thread.join(self._connect_timeout_seconds + WAIT_GRACE_SECONDS)
        else:
            self._end()

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the connection to {self.endpoint} was made in process {self._pid} and cannot be used after a fork; "
                "make a new RemoteTrunk in the child, or start workers with the 'spawn' method"
            )
        if self._closing:
            raise ClosedError(f"the connection to {self.endpoint} is closed")

    def _command(self, command: Callable[[], None]) -> bool:
        """Hand a command to the I/O thread; False if that has ended."""
        with self._lock:
            if self._ended:
                return False
            self._commands.append(command)
            try:
                os.write(self._wake_write, b"\0")
            except BlockingIOError:
                pass  # the pipe is full of wake-ups already
            return True

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    # --- the I/O thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: ZslError = ClosedError(f"the connection to {self.endpoint} was closed")
        try:
            self._context = zmq.Context()
            self._connect()
            while not self._closing:
                self._turn()
        except ZslError as raised:
            error = raised
        except Exception as raised:
            logger.exception("the connection's thread failed")
            error = InternalError(f"the connection to {self.endpoint} failed: {raised}")
        finally:
            self._closing = True
            self._shut_down(error)

    def _shut_down(self, error: ZslError) -> None:
        if self._welcome is not None and self._dealer is not None:
            self._dealer.send(encode(Bye(session=self._welcome.session, epoch=self._welcome.epoch)))
        if not self._opened.done():
            self._opened.set_exception(error)
        self._end()
        self._run_commands()
        for pending in (*self._sent.values(), *self._waiting):
            _fail(pending, error)
        if self._dealer is not None:
            self._dealer.close()
        if self._context is not None:
            self._context.term()

    def _turn(self) -> None:
        """Wait for something to happen, and handle it."""
        assert self._dealer is not None
        self._poller.poll(max(0, math.ceil(self._seconds_to_next_timer() * 1000)))
        self._drain_wake_pipe()
        self._run_commands()
        dealer = self._dealer
        while (frames := dealer.receive()) is not None:
            self._on_frames(frames)
        while self._dealer is dealer and (event := dealer.link_event()) is not None:
            self._on_link_event(event)
        self._check_timers()
        self._send_waiting()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _drain_wake_pipe(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass

    def _connect(self) -> None:
        """A fresh socket, and HELLO on it: nothing queued on an old one can arrive twice."""
        assert self._context is not None
        if self._dealer is not None:
            self._dealer.close(linger_ms=0)
        self._dealer = Dealer(self._context, self.endpoint)
        self._poller = zmq.Poller()
        for readable in (self._dealer.socket, self._dealer.monitor, self._wake_read):
            self._poller.register(readable, zmq.POLLIN)
        self._refused = False
        self._begin_hello()

    def _begin_hello(self) -> None:
        if self._welcome is not None or self._hello_deadline == 0.0:
            self._hello_deadline = time.monotonic() + self._connect_timeout_seconds
        self._welcome = None
        self._hello_request = None
        replay = sorted(self._sent.values(), key=lambda pending: pending.request)
        self._sent.clear()
        for pending in reversed(replay):
            self._replay(pending, ConnectionLost(f"the connection to {self.endpoint} was lost twice in one request"))

    def _replay(self, pending: Pending, error: ZslError, after_seconds: float = 0.0) -> None:
        """Put a request in front of the queue again, complete; or fail it if it was replayed before."""
        pending.attempt += 1
        pending.complete = True
        pending.not_before = time.monotonic() + after_seconds
        if pending.attempt >= MAX_ATTEMPTS:
            _fail(pending, error)
        else:
            self._waiting.appendleft(pending)

    def _send_waiting(self) -> None:
        assert self._dealer is not None
        if self._welcome is None:
            if self._hello_request is None:
                self._say_hello()
            return
        now = time.monotonic()
        limits = self._welcome.limits
        inflight_bytes = sum(pending.nbytes for pending in self._sent.values())
        held_back: list[Pending] = []
        while self._waiting:
            pending = self._waiting.popleft()
            if not pending.future.running() and not pending.future.set_running_or_notify_cancel():
                continue
            over_credit = len(self._sent) >= limits.max_inflight_requests or (
                bool(self._sent) and inflight_bytes + pending.nbytes > limits.max_inflight_bytes
            )
            if over_credit or pending.not_before > now:
                held_back.append(pending)
                continue
            if self._send_one(pending):
                inflight_bytes += pending.nbytes
        self._waiting.extend(held_back)

    def _send_one(self, pending: Pending) -> bool:
        assert self._dealer is not None and self._welcome is not None
        try:
            header, buffers = pending.build(self._welcome, pending)
            largest = max((len(buffer) for buffer in buffers), default=0)
            if largest > self._welcome.limits.max_message_bytes:
                raise TooLargeError(
                    f"a tensor of {largest} bytes is over the {self._welcome.limits.max_message_bytes} that "
                    f"{self.endpoint} takes; use a smaller batch"
                )
            frames = encode(header, buffers)
        except Exception as error:
            _fail(pending, error)
            return False
        self._sent[pending.request] = pending
        if not self._dealer.send(frames):
            self._connect()  # the connection has just gone
            return False
        return True

    def _say_hello(self) -> None:
        assert self._dealer is not None
        model, cut, dtype = self._hello
        request = self.new_request_id()
        hello = Hello(request=request, software=zsl.__version__, dtype=dtype, model=model, cut=cut)
        if self._dealer.send(encode(hello)):
            self._hello_request = request

    def _say_release(self, step: int, session: bytes) -> None:
        if self._welcome is not None and self._dealer is not None and self._welcome.session == session:
            self._dealer.send(encode(Release(session=session, epoch=self._welcome.epoch, step=step)))

    # --- what comes in -----------------------------------------------------------------------------------------

    def _on_frames(self, frames: list[Frame]) -> None:
        self._last_heard = time.monotonic()
        try:
            message = decode(frames, TO_CLIENT)
        except WireError as error:
            logger.warning("%s sent a message that is not of the protocol: %s", self.endpoint, error)
            if self._welcome is None:
                raise
            return
        header = message.header
        if isinstance(header, Welcome):
            if header.request == self._hello_request:
                self._welcome = header
                self._last_ping = self._last_heard
                if not self._opened.done():
                    self._opened.set_result(header)
        elif isinstance(header, Error):
            self._on_error(header)
        elif isinstance(header, GoAway):
            logger.warning("the trunk at %s is shutting down; it takes no new step", self.endpoint)
        elif not isinstance(header, Pong):
            pending = self._sent.pop(getattr(header, "request", -1), None)
            if pending is not None:  # otherwise a late answer to something given up
                pending.future.set_result(message)

    def _on_error(self, header: Error) -> None:
        error = WIRE_ERRORS.get(header.code, InternalError)(
            f"{header.text} [trunk {self.endpoint}]", retry_after_ms=header.retry_after_ms
        )
        if header.request is not None and header.request == self._hello_request:
            raise error
        pending = self._sent.pop(header.request, None) if header.request is not None else None
        if header.retry is Retry.REHELLO:
            if pending is not None:
                self._replay(pending, error)
            if self._welcome is not None:
                self._begin_hello()
        elif pending is None:
            logger.warning("%s", error)
        elif header.retry is Retry.REPLAY:
            self._replay(pending, error)
        elif header.retry is Retry.SAME:
            pending.not_before = time.monotonic() + header.retry_after_ms / 1000
            self._waiting.append(pending)
        else:
            _fail(pending, error)

    def _on_link_event(self, event: LinkEvent) -> None:
        if event is LinkEvent.REFUSED:
            self._refused = True
        elif event is LinkEvent.LOST and (self._welcome is not None or self._hello_request is not None):
            logger.warning("the connection to %s was lost; connecting again", self.endpoint)
            self._connect()

    # --- time --------------------------------------------------------------------------------------------------

    def _seconds_to_next_timer(self) -> float:
        now = time.monotonic()
        times = [pending.deadline for pending in (*self._sent.values(), *self._waiting)]
        times += [pending.not_before for pending in self._waiting if pending.not_before > now]
        if self._welcome is not None:
            times.append(self._last_ping + self._welcome.limits.ping_ms / 1000)
        else:
            times.append(self._hello_deadline)
            if self._hello_request is None:
                times.append(now + 0.02)  # IMMEDIATE: HELLO can go only once there is a connection
        return min(times) - now

    def _check_timers(self) -> None:
        now = time.monotonic()
        for pending in [p for p in self._sent.values() if p.deadline <= now]:
            del self._sent[pending.request]
            if self._welcome is not None and self._dealer is not None:
                session, epoch = self._welcome.session, self._welcome.epoch
                self._dealer.send(encode(Cancel(session=session, epoch=epoch, request=pending.request)))
            _fail(pending, self._timeout())
        for pending in [p for p in self._waiting if p.deadline <= now]:
            self._waiting.remove(pending)
            _fail(pending, self._timeout())
        if self._welcome is None:
            if now >= self._hello_deadline:
                raise self._unreachable()
            return
        ping_seconds = self._welcome.limits.ping_ms / 1000
        if now - self._last_ping >= ping_seconds:
            self._last_ping = now
            if self._dealer is not None:
                ping = Ping(session=self._welcome.session, epoch=self._welcome.epoch, request=self.new_request_id())
                self._dealer.send(encode(ping))
            if now - self._last_heard > SILENT_PINGS * ping_seconds + self._connect_timeout_seconds:
                logger.warning("%s has been silent for %.0f s; connecting again", self.endpoint, now - self._last_heard)
                self._connect()

    def _timeout(self) -> RequestTimeout:
        return RequestTimeout(
            f"{self.endpoint} did not answer within {self.request_timeout_seconds:g} s; "
            "is the daemon overloaded, or the request too large for it?"
        )

    def _unreachable(self) -> ZslError:
        seconds = self._connect_timeout_seconds
        if self._opened.done():
            return ConnectionLost(
                f"the connection to {self.endpoint} was lost and could not be made again in {seconds:g} s"
            )
        how = (
            "nothing listens there" if self._refused else "something is there, but it does not answer as a trunk daemon"
        )
        return TrunkUnreachable(
            f"no trunk daemon at {self.endpoint}: {how} (tried for {seconds:g} s); "
            "start one with zsl-trunkd, or check host and port"
        )


def _fail(pending: Pending, error: BaseException) -> None:
    if not pending.future.running() and not pending.future.set_running_or_notify_cancel():
        return
    if not pending.future.done():
        pending.future.set_exception(error)
