"""Connection to a trunk daemon for any thread: submit a request and wait on its future, or call.

One thread at a time drives the link (`zsl.link.link`), under a lock: the connection's I/O thread, or a caller that
waits for its own request, which saves two thread switches. Without that a round trip of 2 kB takes 1.07 to 1.10 times
as long; at 0.8 MB and above nothing is gained (`bin/bench transport` on two cores, rows "zsl by thread" and "zsl").
Other threads append commands to a queue, and wake the driving thread by a pipe. All waits are bounded. Imports no
torch.

Ctrl-C may interrupt a caller anywhere, also while it drives. `_driving` is released in a `finally` that calls nothing
before it; the next thread that drives finds `_torn` set, and makes the link start over.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from itertools import count
from queue import Empty, SimpleQueue
from typing import TypeVar

from zsl.errors import ClosedError, InternalError, RequestTimeout, ZslError
from zsl.link.adapter_versions import EncodedAdapter
from zsl.link.cancellation import given_up_by
from zsl.link.endpoints import parse_endpoints
from zsl.link.link import Link
from zsl.link.traffic import Traffic
from zsl.link.unanswered_requests import Build, Pending, check_timeouts
from zsl.transport.curve_keys import ClientKeys
from zsl.wire.frames import Message
from zsl.wire.messages import Cut, FloatDtypeName, Hello, ModelIdentity, StatusRequest, Welcome

logger = logging.getLogger(__name__)

WAIT_GRACE_SECONDS = 5.0  # a wait ends this long after the link's own deadline
IDLE_SECONDS = 0.5  # interval at which the I/O thread turns an idle link

T = TypeVar("T")


class Connection:
    """Session with a daemon, kept alive until `close`. `endpoint`: one, or several separated by commas, of which the
    first that answers is used. `link` is None before `open`."""

    def __init__(
        self,
        endpoint: str,
        *,
        keys: ClientKeys | None = None,
        connect_timeout_seconds: float,
        request_timeout_seconds: float,
    ) -> None:
        check_timeouts(connect_timeout_seconds=connect_timeout_seconds, request_timeout_seconds=request_timeout_seconds)
        self._endpoints = parse_endpoints(endpoint)
        self.endpoint = ",".join(self._endpoints)
        self._keys = keys
        self._connect_timeout_seconds = connect_timeout_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self._pid = os.getpid()
        # Reentrant: a finalizer may run `release` at any point, also inside this thread's own `submit`.
        self._lock = threading.RLock()
        self._commands: deque[Callable[[Link], None]] = deque()
        self._ids = count(1)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread: threading.Thread | None = None
        self.link: Link | None = None
        # Reentrant, because its release by a thread that does not hold it raises an error and changes nothing.
        self._driving = threading.RLock()
        self._driver: int | None = None  # id of the calling thread that holds `_driving`
        self._torn = False  # a turn has begun and not ended
        # An item makes the I/O thread drive. `put` is reentrant, as finalizers need it.
        self._wanted: SimpleQueue[None] = SimpleQueue()
        self._opened: Future[Welcome] = Future()
        self._welcome: Welcome | None = None  # result of `_opened`
        self._closing = False
        self._failure: ZslError | None = None  # the error that ended the link
        self._ended_by: ZslError | None = None  # set: no more commands are accepted

    def open(self, model: ModelIdentity | None, cut: Cut | None, dtype: FloatDtypeName) -> Welcome:
        """Open the session, and wait for the daemon's WELCOME.

        Raises `TrunkUnreachable`, `WrongModelError` or another `WireError`.
        """
        self._check_usable()
        with self._lock:
            if self._thread is None:
                hello = Hello(request=0, software="", dtype=dtype, model=model, cut=cut, resume=None)
                self._thread = threading.Thread(target=self._run, args=(hello,), name="zsl-io", daemon=True)
            if self._thread.ident is None:
                self._thread.start()
        # The link ends it sooner: after the connect timeout, unless a daemon answers that it is still loading.
        self._welcome = self._result(self._opened, self._connect_timeout_seconds + self.request_timeout_seconds)
        return self._welcome

    def __repr__(self) -> str:
        return f"Connection({self.endpoint}: {'not opened' if self.link is None else repr(self.link.state)})"

    @property
    def welcome(self) -> Welcome:
        """WELCOME that opened the session. Raises `ClosedError` before `open`."""
        if self._welcome is None:
            raise self._not_open()
        return self._welcome

    @property
    def traffic(self) -> Traffic:
        """Messages and bytes sent and received so far."""
        return Traffic() if self.link is None else self.link.traffic

    def new_request_id(self) -> int:
        """Return an unused request id, larger than all before it."""
        return next(self._ids)

    def submit(
        self, request: int, build: Build, *, nbytes: int = 0, adapter: EncodedAdapter | None = None
    ) -> Future[Message]:
        """Send a request, after its adapter if the session lacks that.

        The future brings the RESULT (or STATUS), or raises a `ZslError`.
        """
        self._check_usable()
        if self._thread is None:
            raise self._not_open()
        pending = self._pending(request, build, nbytes, adapter)
        if not self._command(lambda link: link.add(pending)):
            self._check_usable()
        return pending.future

    def call(self, request: int, build: Build, *, nbytes: int = 0, adapter: EncodedAdapter | None = None) -> Message:
        """Submit a request and wait. This thread drives the link meanwhile if no other does.

        Raises a `ZslError`; `CancelledByClientError` if this thread's work is cancelled (`zsl.link.cancellation`).
        """
        with given_up_by(lambda: self.cancel(request)):
            return self._call(request, build, nbytes, adapter)

    def _call(self, request: int, build: Build, nbytes: int, adapter: EncodedAdapter | None) -> Message:
        self._check_usable()  # before any lock: in a forked child a lock may stay locked for ever
        link, this_thread = self.link, threading.get_ident()
        if self._welcome is None or link is None or self._driver == this_thread:
            return self.wait(self.submit(request, build, nbytes=nbytes, adapter=adapter))
        pending: Pending | None = None
        try:
            if self._driving.acquire(blocking=False):
                self._driver = this_thread
                self._check_usable()
                pending = self._pending(request, build, nbytes, adapter)
                self._drive(link, pending)
        except BaseException:
            if pending is not None:
                pending.future.cancel()  # Ctrl-C: its caller waits no more
            raise
        finally:
            if self._driver == this_thread:
                self._driver = None
            try:
                self._driving.release()
            except RuntimeError:
                pass  # another thread drives
            if self._closing or self._commands or self._torn or link.busy:
                self._wanted.put(None)
        return self.wait(
            self.submit(request, build, nbytes=nbytes, adapter=adapter) if pending is None else pending.future
        )

    def submit_status(self) -> Future[Message]:
        """Send a STATUS request. The future's message has a `Status` header."""
        request = self.new_request_id()
        return self.submit(request, lambda welcome, pending: (StatusRequest(request=request), ()))

    def cancel(self, request: int) -> None:
        """End a request with `CancelledByClientError`. Never waits."""
        self._command(lambda link: link.cancel(request))

    def release(self, step: int, session: bytes) -> None:
        """Tell the daemon that no backward will follow for this step. Never waits, so finalizers may call it."""
        if os.getpid() == self._pid:
            self._command(lambda link: link.release(step, session))

    @property
    def longest_wait_seconds(self) -> float:
        """Upper bound of the time from submitting a request to its end."""
        return self.request_timeout_seconds + WAIT_GRACE_SECONDS

    def wait(self, future: Future[Message]) -> Message:
        """Return the future's message. The wait is bounded even if the I/O thread has died."""
        try:
            return self._result(future, self.request_timeout_seconds)
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """End the session and the I/O thread. Unanswered requests fail with `ClosedError`."""
        if os.getpid() != self._pid or self._closing:
            return
        self._closing = True
        self._command(lambda link: None)
        if self._thread is threading.current_thread() or self._driver == threading.get_ident():
            return  # a finalizer that ran while this thread drives; the I/O thread ends the link
        if self._thread is not None:
            self._thread.join(self._connect_timeout_seconds + WAIT_GRACE_SECONDS)
        else:
            self._end(self._closed())

    def _result(self, future: Future[T], seconds: float) -> T:
        try:
            return future.result(seconds + WAIT_GRACE_SECONDS)
        except TimeoutError:
            if future.done():
                raise
            raise RequestTimeout(f"{self.endpoint} did not answer within {seconds:g} s") from None

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise after_fork(self.endpoint, self._pid)
        if self._ended_by is not None:
            raise copy(self._ended_by)  # a copy, whose traceback has the frames of this call only
        if self._closing:
            raise self._closed()

    def _pending(self, request: int, build: Build, nbytes: int, adapter: EncodedAdapter | None) -> Pending:
        return Pending(request, build, time.monotonic() + self.request_timeout_seconds, nbytes, adapter)

    def _not_open(self) -> ClosedError:
        return ClosedError(f"the connection to {self.endpoint} is not open; call connect() first")

    def _closed(self) -> ClosedError:
        return ClosedError(f"the connection to {self.endpoint} is closed")

    def _command(self, command: Callable[[Link], None]) -> bool:
        """Queue a command for the driving thread. Return False if the connection has ended."""
        with self._lock:
            if self._ended_by is not None:
                return False
            self._commands.append(command)
            with suppress(BlockingIOError):  # the pipe is full of wake-ups already
                os.write(self._wake_write, b"\0")
            self._wanted.put(None)
            return True

    def _end(self, error: ZslError) -> None:
        with self._lock:
            self._ended_by = error
            os.close(self._wake_read)
            os.close(self._wake_write)

    # --- driving -----------------------------------------------------------------------------------------------

    def _drive(self, link: Link, pending: Pending) -> None:
        """Send a request, and drive the link until the request has ended."""
        try:
            self._advance(link, pending)
            while not pending.future.done() and not self._closing:
                self._wait(link)
                self._advance(link)
        except Exception as error:
            self._fail(error)

    def _wait(self, link: Link) -> None:
        """Wait for something to do, and empty the pipe of wake-ups, whose commands are queued."""
        if link.wait(self._wake_read):
            with suppress(BlockingIOError):
                os.read(self._wake_read, 4096)

    def _advance(self, link: Link, pending: Pending | None = None) -> None:
        """Run queued commands and one turn of the link. Raises `ZslError` if the link cannot go on."""
        if self._torn:
            link.start_over()
        self._torn = True
        if pending is not None:
            link.add(pending)
        self._run_commands(link)
        link.turn(receives=pending is None)  # a caller waits for its answer after this turn, and receives then
        self._torn = False

    def _fail(self, error: Exception) -> None:
        """Note the error that ended the link; the I/O thread closes the link."""
        if isinstance(error, ZslError):
            self._failure = error
        else:
            logger.exception("the connection failed")
            self._failure = InternalError(f"{self!r} failed: {error}")
        self._closing = True

    def _run(self, hello: Hello) -> None:
        """Drive the link whenever it is busy, and at intervals while idle; body of the I/O thread."""
        with self._driving:
            if self.link is not None:
                return  # Ctrl-C interrupted the start of the thread, and it was started again
            link = self.link = Link(
                self._endpoints,
                hello,
                keys=self._keys,
                opened=self._opened,
                new_request_id=self.new_request_id,
                connect_timeout_seconds=self._connect_timeout_seconds,
                request_timeout_seconds=self.request_timeout_seconds,
            )
        try:
            self._wanted.put(None)
            while not self._closing:
                wanted = self._is_wanted()
                if not self._driving.acquire(blocking=wanted):
                    continue  # a caller drives
                try:
                    self._advance(link)
                    while (link.busy or self._commands) and not self._closing:
                        self._wait(link)
                        self._advance(link)
                finally:
                    self._driving.release()
        except Exception as error:
            self._fail(error)
        with self._driving:
            ended_by = self._failure or self._closed()
            self._closing = True
            self._end(ended_by)
            self._run_commands(link)
            link.close(ended_by, say_bye=not self._torn)

    def _is_wanted(self) -> bool:
        """Wait up to `IDLE_SECONDS`, and return whether the link must be driven before that."""
        try:
            self._wanted.get(timeout=IDLE_SECONDS)
        except Empty:
            return False
        while not self._wanted.empty():
            self._wanted.get_nowait()  # one turn serves all of them
        return True

    def _run_commands(self, link: Link) -> None:
        while self._commands:
            self._commands[0](link)  # twice, if interrupted before the next line: each command may run twice
            self._commands.popleft()


def after_fork(endpoint: str, pid: int) -> ClosedError:
    """Return the error for a connection used in a forked child."""
    return ClosedError(
        f"the connection to {endpoint} was made in process {pid} and cannot be used after a fork; "
        "make a new RemoteTrunk in the child, or start workers with the 'spawn' method"
    )
