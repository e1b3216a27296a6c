"""Run the idle or active clients of `connections.py`, as its JSON lines on stdin request.

Each line is answered with one line of JSON on stdout.

    idle ENDPOINT          {"sessions": 1000}             keep this number of sessions that only ping
    active ENDPOINT COUNT  {"tokens": 1, "seconds": 5}    COUNT clients send forwards, each the next one when it has its
                                                          answer; the seconds that each forward took

To the daemon an idle session looks like a real client's: a connection for requests, and a connection for pings, which
are sent when due. Here it is two sockets that are looked at when an answer is due, so that a thousand of them leave
the machine to those that are measured. The active clients are real ones. Both end with stdin. Imports no torch.
"""

from __future__ import annotations

import json
import selectors
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import click
import zmq
from echo_trunk import HIDDEN

import zsl
from zsl.link.connection import Connection
from zsl.link.unanswered_requests import Pending
from zsl.transport.dealer import HANDSHAKE_MS, KEEPALIVE
from zsl.wire.frames import Frame, decode, encode
from zsl.wire.messages import (
    TO_CLIENT,
    Bye,
    Forward,
    Header,
    Hello,
    Ping,
    Pong,
    TensorDescriptor,
    Welcome,
)

ITEM_BYTES = 4
OPENED_AT_ONCE = 100  # more could be too many for the daemon's backlog
ANSWER_MS = 30_000
LINGER_MS = 1_000
TURN_SECONDS = 0.005  # pings of a turn arrive together; with a longer one, the others would meet crowds of them
WARM_UP_SECONDS = 0.5  # of each measurement, until all are at it
REQUEST_TIMEOUT_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class IdleSession:
    """`requests` and `heartbeat`: its two connections. The frames are the same each time: the daemon does not mind."""

    requests: zmq.Socket[bytes]
    heartbeat: zmq.Socket[bytes]
    ping: list[Frame]
    bye: list[Frame]


class IdleSessions:
    """`turn` is to be called all the time; `missed` counts the pings that had no answer when the next was due."""

    def __init__(self, endpoint: str) -> None:
        self.missed = 0
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = int(self._context.get(zmq.SOCKET_LIMIT))
        self._sessions: list[IdleSession] = []
        self._next: cycle[IdleSession] = cycle(())
        self._awaited: deque[IdleSession] = deque()  # those that were pinged, the first one first
        self._ping_seconds = 1.0
        self._pinged_until = 0.0

    def __len__(self) -> int:
        return len(self._sessions)

    def change_to(self, count: int) -> None:
        """Open what is missing, or close what is too many. Raises `TimeoutError` if the daemon does not answer."""
        while len(self) < count:
            self._open(min(OPENED_AT_ONCE, count - len(self)))
        for session in self._sessions[count:]:
            session.requests.send_multipart(session.bye)
            session.requests.close(LINGER_MS)
            session.heartbeat.close(0)
        del self._sessions[count:]
        self._awaited = deque(session for session in self._awaited if not session.heartbeat.closed)
        self._next = cycle(self._sessions)
        self._pinged_until = time.monotonic()

    def turn(self) -> None:
        """Take in pongs, and send the pings that are due: those of one interval evenly spread over it."""
        for _ in range(len(self._awaited)):
            session = self._awaited.popleft()
            if int(session.heartbeat.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                hear(session.heartbeat, Pong)
            else:
                self._awaited.append(session)
        due = int((time.monotonic() - self._pinged_until) / self._ping_seconds * len(self))
        for session in islice(self._next, due):
            self.missed += session in self._awaited
            session.heartbeat.send_multipart(session.ping)
            self._awaited.append(session)
            self._pinged_until += self._ping_seconds / len(self)

    def _open(self, count: int) -> None:
        hello = encode(Hello(request=1, software=zsl.__version__, dtype="f32", model=None, cut=None, resume=None))
        connections = [self._connection() for _ in range(count)]
        for connection in connections:
            connection.send_multipart(hello)
        for connection in connections:
            welcome = hear(connection, Welcome)
            named = {"session": welcome.session, "epoch": welcome.epoch}
            ping, bye = encode(Ping(request=2, **named)), encode(Bye(**named))
            session = IdleSession(connection, self._connection(), ping, bye)
            session.heartbeat.send_multipart(session.ping)
            self._sessions.append(session)
            self._ping_seconds = welcome.limits.ping_ms / 1000
        for session in self._sessions[-count:]:
            hear(session.heartbeat, Pong)

    def _connection(self) -> zmq.Socket[bytes]:
        """Open a connection with the socket options of a real client."""
        connection = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.HANDSHAKE_IVL, HANDSHAKE_MS), *KEEPALIVE):
            connection.setsockopt(option, value)
        connection.connect(self._endpoint)
        return connection


def hear(connection: zmq.Socket[bytes], wanted: type[Header]) -> Any:
    """Return the next message. Raises `TimeoutError`, or `RuntimeError` for another type than wanted."""
    if not connection.poll(ANSWER_MS):
        raise TimeoutError(f"no {wanted.__name__} in {ANSWER_MS / 1000:g} s")
    header = decode(connection.recv_multipart(), TO_CLIENT).header
    if not isinstance(header, wanted):
        raise RuntimeError(f"the daemon answered with {header!r} where a {wanted.__name__} is due")
    return header


class ActiveClient:
    """A real client that runs on the caller's thread."""

    def __init__(self, endpoint: str) -> None:
        self._connection = Connection(
            endpoint,
            connect_timeout_seconds=REQUEST_TIMEOUT_SECONDS,
            request_timeout_seconds=REQUEST_TIMEOUT_SECONDS,
        )
        self._connection.open(None, None, "f32")

    def forwards(self, tokens: int, begin: float, end: float) -> list[float]:
        """Send forwards until `end`; how many seconds those took that were sent after `begin`."""
        activations = bytes(tokens * HIDDEN * ITEM_BYTES)
        taken = []
        while (sent := time.perf_counter()) < end:
            self._forward(activations, tokens)
            if sent >= begin:
                taken.append(time.perf_counter() - sent)
        return taken

    def _forward(self, activations: bytes, tokens: int) -> None:
        request = self._connection.new_request_id()
        nbytes = len(activations)
        descriptor = TensorDescriptor(role="activations", dtype="f32", shape=(1, tokens, HIDDEN), nbytes=nbytes)

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            header = Forward(
                session=welcome.session,
                epoch=welcome.epoch,
                request=request,
                attempt=pending.attempt,
                budget_ms=pending.budget_ms(),
                adapter=None,
                keep=False,
                reveal=[],
                cache=None,
                tensors=[descriptor],
            )
            return header, [activations]

        answer = self._connection.call(request, build, nbytes=nbytes)
        assert len(answer.buffers[0]) == nbytes


@click.group()
def main() -> None:
    """Clients that do what stdin says."""


@main.command()
@click.argument("endpoint")
def idle(endpoint: str) -> None:
    """Keep idle sessions."""
    sessions = IdleSessions(endpoint)
    say({})
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            if selector.select(TURN_SECONDS if len(sessions) else None):
                line = sys.stdin.readline()
                if not line:
                    return
                began = time.perf_counter()
                sessions.change_to(json.loads(line)["sessions"])
                say({"seconds": time.perf_counter() - began, "missed_pings": sessions.missed})
            sessions.turn()


@main.command()
@click.argument("endpoint")
@click.argument("count", type=int)
def active(endpoint: str, count: int) -> None:
    """Send forwards, when it is time."""
    clients = [ActiveClient(endpoint) for _ in range(count)]
    say({})
    with ThreadPoolExecutor(count) as pool:
        while line := sys.stdin.readline():
            asked = json.loads(line)
            begin = time.perf_counter() + WARM_UP_SECONDS
            end = begin + asked["seconds"]
            taken = pool.map(lambda client: client.forwards(asked["tokens"], begin, end), clients)  # noqa: B023 (all of it ends here)
            say({"seconds": [seconds for of_client in taken for seconds in of_client]})


def say(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
