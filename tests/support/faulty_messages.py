"""The faulty link for ZeroMQ without encryption: whole messages get lost, doubled, swapped, and said again later.

    with FaultyMessages(daemon.port) as link:
        link.drop("down", only=MessageType.RESULT)  # the next one
        ...
        link.inject("up", link.recorded("up")[0])  # what an earlier connection said, on the present one

It reads ZMTP 3 with the mechanism NULL, whose messages can be told apart. The faults of bytes work too, on what the
faults of messages have left. This module knows of zsl's protocol where a message's type stands, and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Literal

from .faulty_link import WAYS, FaultyLink, Way
from .faulty_way import Filter, WayName

Frames = list[bytes]  # of one message
Change = Literal["drop", "duplicate", "swap"]

GREETING_BYTES = 64
MECHANISM = slice(12, 32)
MORE, LONG, COMMAND = 1, 2, 4
RECORDED_MESSAGES = 1000


class ZmtpReader:
    """Tells the messages of one way of a connection apart."""

    def __init__(self) -> None:
        self._greeting = b""
        self._unread = bytearray()
        self._message: Frames = []

    def feed(self, chunk: bytes) -> Iterator[bytes | Frames]:
        """Messages that are complete, as their frames; anything else as the bytes that it is."""
        missing = GREETING_BYTES - len(self._greeting)
        if missing:
            self._greeting += chunk[:missing]
            yield chunk[:missing]
            if len(self._greeting) == GREETING_BYTES:
                assert self._greeting[MECHANISM].rstrip(b"\0") == b"NULL", "the messages are encrypted"
        self._unread += chunk[missing:]
        while frame := self._next_frame():
            flags, body = frame
            if flags & COMMAND:
                yield encode_frame(flags, body)
                continue
            self._message.append(body)
            if not flags & MORE:
                yield self._message
                self._message = []

    def _next_frame(self) -> tuple[int, bytes] | None:
        if not self._unread:
            return None
        flags = self._unread[0]
        begin = 9 if flags & LONG else 2
        end = begin + int.from_bytes(self._unread[1:begin])
        if len(self._unread) < max(begin, end):
            return None
        body = bytes(self._unread[begin:end])
        del self._unread[:end]
        return flags, body


def encode_frame(flags: int, body: bytes) -> bytes:
    if len(body) < 256:
        return bytes([flags & ~LONG, len(body)]) + body
    return bytes([flags | LONG]) + len(body).to_bytes(8) + body


def encode_message(frames: Frames) -> bytes:
    *others, last = frames
    return b"".join([*(encode_frame(MORE, frame) for frame in others), encode_frame(0, last)])


def type_of(message: Frames) -> int | None:
    """The type byte of zsl's preamble."""
    preamble = message[0]
    return preamble[5] if preamble[:4] == b"ZSLT" and len(preamble) > 5 else None


@dataclass
class Rule:
    """A change to every n-th message of a type, so many times."""

    change: Change
    only: int | None
    every: int
    left: float
    seen: int = 0

    def applies(self, message: Frames) -> bool:
        if not self.left or self.only not in (None, type_of(message)):
            return False
        self.seen += 1
        if self.seen % self.every:
            return False
        self.left -= 1
        return True


class FaultyMessages(FaultyLink):
    """A `FaultyLink` that knows where a message begins and ends. `happened` counts each change, too."""

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        super().__init__(target_port, seed=seed)
        self._rules: dict[WayName, list[Rule]] = {way: [] for way in WAYS}
        self._recorded: dict[WayName, deque[Frames]] = {way: deque(maxlen=RECORDED_MESSAGES) for way in WAYS}

    def drop(self, way: Way, *, count: float = 1, every: int = 1, only: int | None = None) -> None:
        """Messages do not arrive: the next `count` ones, of each `every`, of the type `only`."""
        self._add(way, "drop", only, every, count)

    def duplicate(self, way: Way, *, count: float = inf, every: int = 1, only: int | None = None) -> None:
        """Messages arrive twice."""
        self._add(way, "duplicate", only, every, count)

    def swap(self, way: Way, *, count: float = 1, every: int = 1, only: int | None = None) -> None:
        """A message arrives after the one that was sent after it."""
        self._add(way, "swap", only, every, count)

    def recorded(self, way: WayName) -> list[Frames]:
        """The messages that were sent so far on all connections, those too that did not arrive; the last thousand."""
        return list(self._recorded[way])

    def inject(self, way: WayName, message: Frames) -> None:
        """Say this on the connection that was opened last. A message that was dropped arrives late by it."""
        self._on_loop(self._inject(way, message))

    def _add(self, way: Way, change: Change, only: int | None, every: int, count: float) -> None:
        for name in WAYS:
            if way in (name, "both"):
                self._rules[name].append(Rule(change, only, every, count))

    async def _heal(self) -> None:
        self._rules = {way: [] for way in WAYS}
        await super()._heal()

    async def _inject(self, way: WayName, message: Frames) -> None:
        assert self._connections, "nobody is connected"
        await self._ways[way].send(self._connections[-1], encode_message(message))
        self._note("inject")

    def _filter(self, way: WayName) -> Filter:
        reader = ZmtpReader()
        held: list[bytes] = []  # until the next message has passed

        def parts_of(chunk: bytes) -> Iterator[bytes]:
            for part in reader.feed(chunk):
                if isinstance(part, bytes):
                    yield part
                    continue
                self._recorded[way].append(part)
                raw = encode_message(part)
                change = next((rule.change for rule in self._rules[way] if rule.applies(part)), None)
                if change == "swap" and not held:
                    held.append(raw)
                    continue
                if change == "drop":
                    self._note("drop")
                    continue
                yield raw
                if change == "duplicate":
                    self._note("duplicate")
                    yield raw
                if held:
                    self._note("swap")
                    yield held.pop()

        return lambda chunk: list(parts_of(chunk))
