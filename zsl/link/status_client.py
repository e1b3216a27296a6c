"""Client for one daemon's STATUS, WELCOME and round-trip time, without a lasting session.

Runs in the caller's thread. STATUS needs no session. Imports no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import Self

import zmq

import zsl
from zsl.errors import WIRE_ERRORS, ConnectionLost, InternalError, TrunkUnreachable
from zsl.link.endpoints import Endpoints
from zsl.transport.curve_keys import ClientKeys
from zsl.transport.dealer import Dealer, LinkEvent, resolves
from zsl.wire.frames import Message, decode, encode
from zsl.wire.messages import TO_CLIENT, Bye, Error, Header, Hello, Status, StatusRequest, Welcome

CONNECT_TIMEOUT_SECONDS = 10.0
ANSWER_TIMEOUT_SECONDS = 10.0


class StatusClient:
    """Connection to the daemon at `endpoint` (as `parse_endpoints` returns it), open inside `with`.

    `with` raises `TrunkUnreachable` or `TrunkAuthError`, both with the reason, or a `WireError`. A refused connection
    raises at once.
    """

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        self.endpoint = endpoint
        self._keys = keys
        self._endpoints = Endpoints((endpoint,))
        self._ids = count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer: Dealer | None = None

    def __enter__(self) -> Self:
        try:
            self._connect()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def status(self) -> Status:
        """Return the model that the daemon serves, and its load. Raises `ZslError`."""
        answer = self._ask(lambda request: StatusRequest(request=request))
        if not isinstance(answer, Status):
            raise InternalError(f"{self.endpoint} answered STATUS with {type(answer).__name__}")
        return answer

    def welcome(self) -> Welcome:
        """Open a session, end it at once, and return its WELCOME.

        Raises the daemon's refusal: `QuotaError`, `DrainingError` or another `ZslError`.
        """
        answer = self._ask(
            lambda request: Hello(
                request=request, software=zsl.__version__, dtype="f32", model=None, cut=None, resume=None
            )
        )
        if not isinstance(answer, Welcome):
            raise InternalError(f"{self.endpoint} answered HELLO with {type(answer).__name__}")
        self._send(Bye(session=answer.session, epoch=answer.epoch))
        return answer

    def round_trip_seconds(self, trips: int) -> list[float]:
        """Return the sorted round-trip times of `trips` STATUS requests. Raises `ZslError`."""
        took = []
        for _ in range(trips):
            began = time.perf_counter()
            self.status()
            took.append(time.perf_counter() - began)
        return sorted(took)

    # --- the connection ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if not resolves(self.endpoint):
            raise self._endpoints.unreachable(0.0)
        began = time.monotonic()
        give_up_at = began + CONNECT_TIMEOUT_SECONDS
        while True:
            self._dealer = Dealer(self._context, self.endpoint, self._keys)
            event = self._wait_for_link(self._dealer, give_up_at)
            if event is LinkEvent.UP:
                return
            self._dealer.close(linger_ms=0)
            self._dealer = None
            now = time.monotonic()
            if now >= give_up_at or event is LinkEvent.REFUSED:
                raise self._endpoints.unreachable(round(now - began, 1))
            self._endpoints.failed(now)
            time.sleep(max(0.0, min(self._endpoints.not_before, give_up_at) - now))

    def _wait_for_link(self, dealer: Dealer, give_up_at: float) -> LinkEvent | None:
        """Return the event that ends a connection attempt; None after the timeout. Raises `TrunkAuthError`."""
        while (left := give_up_at - time.monotonic()) > 0:
            dealer.monitor.poll(math.ceil(left * 1000))
            while (event := dealer.link_event()) is not None:
                error = self._endpoints.saw(event)
                if error is not None:
                    raise error
                if event is not LinkEvent.MUTE:  # the state until the handshake succeeds
                    return event
        return None

    def _ask(self, header: Callable[[int], Header]) -> Header:
        """Send the message that `header` makes for a request id, and return the answer."""
        request = next(self._ids)
        self._send(header(request))
        give_up_at = time.monotonic() + ANSWER_TIMEOUT_SECONDS
        while (left := give_up_at - time.monotonic()) > 0:
            message = self._receive(left)
            if message is None:
                continue
            answer = message.header
            if isinstance(answer, Error) and answer.request in (request, None):
                raise WIRE_ERRORS.get(answer.code, InternalError)(f"{answer.text} [trunk {self.endpoint}]")
            if getattr(answer, "request", None) == request:
                return answer
        raise TrunkUnreachable(
            f"no trunk daemon at {self.endpoint}: something speaks ZeroMQ there and has said nothing for "
            f"{ANSWER_TIMEOUT_SECONDS:g} s; if it is a daemon, it hangs: look into its log"
        )

    def _send(self, header: Header) -> None:
        if self._dealer is None or not self._dealer.send(encode(header)):
            raise ConnectionLost(f"the connection to {self.endpoint} was lost")

    def _receive(self, seconds: float) -> Message | None:
        """Return the next message; None after the timeout. Raises `ConnectionLost`, or `WireError` if it is invalid."""
        assert self._dealer is not None
        poller = zmq.Poller()
        for readable in (self._dealer.socket, self._dealer.monitor):
            poller.register(readable, zmq.POLLIN)
        poller.poll(math.ceil(seconds * 1000))
        frames = self._dealer.receive()
        if frames is not None:
            return decode(frames, TO_CLIENT)
        while (event := self._dealer.link_event()) is not None:
            if event is not LinkEvent.UP:
                raise ConnectionLost(f"the connection to {self.endpoint} was lost")
        return None

    def _close(self) -> None:
        if self._dealer is not None:
            self._dealer.close()
            self._dealer = None
        self._context.term()
