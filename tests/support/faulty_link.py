"""A TCP link that goes wrong when a test says so.

    with FaultyLink(daemon.port) as link:
        client = TrunkClient(link.endpoint)
        link.reset("up", after_bytes=1000)  # in the middle of whatever the client sends then

A fault is of one way ("up": from the client to the target, "down": back) or of "both". It holds for the connections
that are open and for those to come, until it is set anew or `heal` ends all of them. `happened` counts what really took
place: a test whose fault did not happen shows nothing. Methods may be called from any thread, and have taken effect
when they return. This module knows bytes only; `faulty_messages` knows ZeroMQ's messages.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self

from .faulty_way import Connection, End, FaultyWay, Filter, WayName

Way = Literal["up", "down", "both"]
WAYS: tuple[WayName, ...] = ("up", "down")
WAIT_SECONDS = 20


class FaultyLink:
    """Listens between `with` and its end, on a thread of its own, and leads what connects to 127.0.0.1:`target_port`.

    `accepted` counts the connections, `happened` the faults, by name.
    """

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        self.accepted = 0
        self.happened: Counter[str] = Counter()
        self._target_port = target_port
        self._chance = random.Random(seed)
        self._refuses = False
        self._connections: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = threading.Condition()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    @property
    def port(self) -> int:
        return self._started.result(WAIT_SECONDS)

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def passed_bytes(self) -> dict[WayName, int]:
        return {name: way.passed_bytes for name, way in self._ways.items()}

    @property
    def to_come(self) -> int:
        """Number of faults that wait for the bytes after which they happen."""
        return sum(len(way.faults.flips_at) + len(way.faults.ends_at) for way in self._ways.values())

    def wait_for(self, fault: str, count: int = 1) -> None:
        """Until the fault has happened so many times since the link began."""
        with self._news:
            assert self._news.wait_for(lambda: self.happened[fault] >= count, WAIT_SECONDS), (
                f"{fault}: {self.happened[fault]} of {count} times after {WAIT_SECONDS} s"
            )

    def retarget(self, port: int) -> None:
        """Set the port that new connections lead to."""
        self._target_port = port

    def next_port(self) -> int:
        """Return the port that the connection which has just been accepted leads to."""
        return self._target_port

    def refuse(self) -> None:
        """New connections are reset at once."""
        self._refuses = True

    def delay(self, way: Way, seconds: float, *, jitter_seconds: float = 0.0) -> None:
        """Bytes arrive later, in their order: by `seconds`, and by up to `jitter_seconds` as chance has it."""
        self._on_loop(self._set(way, delay_seconds=seconds, jitter_seconds=jitter_seconds))

    def throttle(self, way: Way, bytes_per_second: float) -> None:
        self._on_loop(self._set(way, bytes_per_second=bytes_per_second))

    def slice(self, way: Way, piece_bytes: int = 1) -> None:
        """Bytes are passed on in pieces of at most this size."""
        self._on_loop(self._set(way, piece_bytes=piece_bytes))

    def flip_bits(self, way: Way, *, every_chunks: int = 0, after_bytes: int | None = None) -> None:
        """One bit changes: in every n-th chunk that is passed on, or in the byte that follows `after_bytes` others."""
        if after_bytes is None:
            self._on_loop(self._set(way, flip_every_chunks=every_chunks))
        else:
            self._on_loop(self._flip(way, after_bytes))

    def blackhole(self, way: Way) -> None:
        """Drop all bytes and closes silently. Healing the link brings none of them back."""
        self._on_loop(self._set(way, swallows=True))

    def hold(self, way: Way) -> None:
        """Nothing arrives until the link is healed, and all of it then: a network that was parted for a while."""
        self._on_loop(self._hold(way))

    def cut(self, way: Way = "both", *, after_bytes: int = 0) -> None:
        """Both ends are closed: of all connections at once, or of the one that passes on the last of `after_bytes`."""
        self._on_loop(self._end("cut", way, after_bytes))

    def reset(self, way: Way = "both", *, after_bytes: int = 0) -> None:
        """The same, by RST."""
        self._on_loop(self._end("reset", way, after_bytes))

    def half_close(self, way: Way, *, after_bytes: int = 0) -> None:
        """The receiver is told that this was all, the sender is told nothing; the other way stays open."""
        self._on_loop(self._end("half_close", way, after_bytes))

    def heal(self) -> None:
        """No fault is set any more."""
        self._on_loop(self._heal())

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.port
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    def _on_loop(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(WAIT_SECONDS)

    # From here on, everything runs on the loop.

    def _named(self, way: Way) -> list[FaultyWay]:
        return [self._ways[name] for name in WAYS if way in (name, "both")]

    def _note(self, fault: str) -> None:
        with self._news:
            self.happened[fault] += 1
            self._news.notify_all()

    async def _set(self, way: Way, **changes: Any) -> None:
        for one in self._named(way):
            for name, value in changes.items():
                setattr(one.faults, name, value)

    async def _flip(self, way: Way, after_bytes: int) -> None:
        for one in self._named(way):
            one.faults.flips_at.add(one.passed_bytes + after_bytes)

    async def _hold(self, way: Way) -> None:
        for one in self._named(way):
            one.faults.passes.clear()

    async def _end(self, how: End, way: Way, after_bytes: int) -> None:
        connections = [] if after_bytes else list(self._connections)
        for one in self._named(way):
            if after_bytes:
                one.faults.ends_at[one.passed_bytes + after_bytes] = how
            for connection in connections:
                one.end(connection, how)
        ended = [connection.task for connection in connections if connection.over and connection.task]
        if ended:
            await asyncio.wait(ended)

    async def _heal(self) -> None:
        self._refuses = False
        for way in self._ways.values():
            way.heal()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ways = {name: FaultyWay(name, self._chance, self._note) for name in WAYS}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            self._loop.add_reader(listener, self._accept, listener)
            self._started.set_result(listener.getsockname()[1])
            await self._stop.wait()
            self._loop.remove_reader(listener)
        # asyncio.run ends the connections that are left.

    def _accept(self, listener: socket.socket) -> None:
        try:
            near, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has gone again
        near.setblocking(False)
        self.accepted += 1
        task = asyncio.create_task(self._connected(near, self.next_port()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: near.close())  # a task that is cancelled before it has begun closes nothing

    async def _connected(self, near: socket.socket, port: int) -> None:
        far = socket.socket()
        connection = Connection(near, far)
        try:
            if self._refuses:
                self._note("refuse")
                raise ConnectionRefusedError
            far.setblocking(False)
            await self._loop.sock_connect(far, ("127.0.0.1", port))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
            async with asyncio.TaskGroup() as group:
                for way in self._ways.values():
                    group.create_task(way.take(connection, self._filter(way.name)))
                    group.create_task(way.give(connection))
        except* OSError:  # one end is lost: the other one is told so
            connection.by_reset = True
        finally:
            if connection in self._connections:
                self._connections.remove(connection)
            connection.close()

    def _filter(self, way: WayName) -> Filter:
        """For one way of a new connection: what a chunk that was read becomes. Each part of it is passed on whole."""
        return lambda chunk: [chunk]
