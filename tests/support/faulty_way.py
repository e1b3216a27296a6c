"""One way through a faulty link: how bytes get from a socket to another, late, in pieces, changed or not at all.

Everything here runs on the link's loop. It knows nothing of threads, and of no other way than its own.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Literal

WayName = Literal["up", "down"]
End = Literal["cut", "reset", "half_close"]
Note = Callable[[str], None]
Filter = Callable[[bytes], list[bytes]]
Chunks = asyncio.Queue[tuple[float, bytes]]  # when each is due; an empty one says that the sender has closed

READ_BYTES = 64 * 1024
QUEUED_CHUNKS = 32  # between the two sockets; beyond it the sender is held up
THROTTLE_TURN_SECONDS = 0.02
NO_LINGER = struct.pack("ii", 1, 0)  # a socket that is closed with it sends RST, not FIN


@dataclass
class Faults:
    """Faults of one direction."""

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    bytes_per_second: float = inf
    piece_bytes: int = READ_BYTES
    flip_every_chunks: int = 0
    swallows: bool = False
    passes: asyncio.Event = field(default_factory=asyncio.Event)
    # At how many passed bytes.
    flips_at: set[int] = field(default_factory=set)
    ends_at: dict[int, End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.passes.set()


class Connection:
    """The two sockets of a connection, and what is on its way between them."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.source = {"up": near, "down": far}
        self.target = {"up": far, "down": near}
        self.queue: dict[WayName, Chunks] = {"up": asyncio.Queue(QUEUED_CHUNKS), "down": asyncio.Queue(QUEUED_CHUNKS)}
        self.last_due = {"up": 0.0, "down": 0.0}
        self.half_closed: set[WayName] = set()
        self.over = False
        self.by_reset = False
        self.task = asyncio.current_task()

    def half_close(self, way: WayName) -> bool:
        """Close one direction; return whether it was open."""
        if way in self.half_closed:
            return False
        self.half_closed.add(way)
        self.target[way].shutdown(socket.SHUT_WR)
        return True

    def end(self, way: WayName, how: End) -> bool:
        """End the connection, or close one direction; return whether that was open."""
        if how == "half_close":
            return self.half_close(way)
        if self.over:
            return False
        assert self.task is not None
        self.over, self.by_reset = True, how == "reset"
        self.task.cancel()
        return True

    def close(self) -> None:
        for end in self.source.values():
            if self.by_reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            end.close()


class FaultyWay:
    """One way of all connections. `note` is told the name of each fault that takes place."""

    def __init__(self, name: WayName, chance: random.Random, note: Note) -> None:
        self.name = name
        self.faults = Faults()
        self.passed_bytes = 0
        self._passed_chunks = 0
        self._chance = chance
        self._note = note
        self._loop = asyncio.get_running_loop()

    def heal(self) -> None:
        healed, self.faults = self.faults, Faults()
        healed.passes.set()

    def end(self, connection: Connection, how: End) -> None:
        if connection.end(self.name, how):
            self._note(how)

    async def take(self, connection: Connection, passed_on: Filter) -> None:
        """Read what comes, until its sender closes."""
        try:
            while chunk := await self._loop.sock_recv(connection.source[self.name], READ_BYTES):
                for part in passed_on(chunk):
                    await self.send(connection, part)
        except ConnectionError:
            if self.faults.passes.is_set() and not self.faults.swallows:
                raise
        await self.send(connection, b"")

    async def send(self, connection: Connection, chunk: bytes) -> None:
        """Put a chunk on its way."""
        now = self._loop.time()
        due = now + self.faults.delay_seconds + self._chance.random() * self.faults.jitter_seconds
        due = connection.last_due[self.name] = max(due, connection.last_due[self.name])
        if due > now:
            self._note("delay")
        await connection.queue[self.name].put((due, chunk))

    async def give(self, connection: Connection) -> None:
        """Pass on what is due, until its sender has closed."""
        while True:
            due, chunk = await connection.queue[self.name].get()
            await asyncio.sleep(due - self._loop.time())
            if chunk:
                await self._pass_on(connection, bytearray(chunk))
            elif self.name in connection.half_closed or await self._is_open(connection):
                connection.half_close(self.name)
                return

    async def _is_open(self, connection: Connection) -> bool:
        while not self.faults.passes.is_set():
            self._note("hold")
            await self.faults.passes.wait()
        if self.faults.swallows:
            self._note("blackhole")
            return False
        return not connection.over and self.name not in connection.half_closed

    async def _pass_on(self, connection: Connection, chunk: bytearray) -> None:
        self._passed_chunks += 1
        every = self.faults.flip_every_chunks
        if every and self._passed_chunks % every == 0:
            self._flip(chunk, self._chance.randrange(len(chunk)))
        while chunk and await self._is_open(connection):
            faults, begin = self.faults, self.passed_bytes
            size = min(len(chunk), faults.piece_bytes)
            if size < len(chunk):
                self._note("slice")
            if faults.bytes_per_second < inf:
                self._note("throttle")
                size = min(size, max(1, int(faults.bytes_per_second * THROTTLE_TURN_SECONDS)))
            size = min([size, *(at - begin for at in faults.ends_at)])
            for at in [at for at in faults.flips_at if at < begin + size]:
                faults.flips_at.remove(at)
                self._flip(chunk, at - begin)
            # Counted before it is sent: another connection may pass bytes on meanwhile.
            self.passed_bytes = begin + size
            how = faults.ends_at.pop(begin + size, None)
            await self._loop.sock_sendall(connection.target[self.name], chunk[:size])
            del chunk[:size]
            if how is not None:
                self.end(connection, how)
            await asyncio.sleep(size / faults.bytes_per_second)

    def _flip(self, chunk: bytearray, index: int) -> None:
        chunk[index] ^= 1 << self._chance.randrange(8)
        self._note("flip_bits")
