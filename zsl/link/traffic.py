"""Count the messages and bytes of a client's connection, and the daemon's seconds. No sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Self

from zsl.wire.frames import Frame
from zsl.wire.messages import Header, Result


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of a connection so far, or between two moments: `later - earlier`.

    `bytes_up` and `bytes_down` count all frames of zsl's messages (preamble, header, tensors), including messages sent
    again, but neither the overhead of ZeroMQ, TCP and encryption nor the heartbeat, which has its own connection.
    `adapter_bytes_up` and `adapter_bytes_down` are their part for adapters on the trunk's layers and their gradients.
    `queue_seconds` and `compute_seconds` are the daemon's, summed over answered requests: a pass for several requests
    counts in full for each.
    """

    answers: int = 0
    replays: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    adapter_bytes_up: int = 0
    adapter_bytes_down: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, earlier: Self) -> Self:
        return type(self)(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(earlier), strict=True)))


class TrafficCounter:
    """Counter of traffic. Written by the thread that drives the link; any thread may call `so_far`."""

    def __init__(self) -> None:
        self._answers = self._bytes_up = self._bytes_down = self._queue_us = self._compute_us = 0
        self._adapter_bytes_up = self._adapter_bytes_down = 0

    def sent(self, frames: Sequence[Frame | bytes]) -> None:
        self._bytes_up += sum(map(len, frames))

    def received(self, frames: Sequence[Frame | bytes]) -> None:
        self._bytes_down += sum(map(len, frames))

    def sent_adapter(self, nbytes: int) -> None:
        """Count the bytes of messages that brought an adapter; `sent` counts them too."""
        self._adapter_bytes_up += nbytes

    def answered(self, header: Header) -> None:
        """Count an answered request."""
        if isinstance(header, Result):
            self._adapter_bytes_down += sum(one.nbytes for one in header.tensors if one.role == "adapter_gradients")
            self._answers += 1
            self._queue_us += header.queue_us
            self._compute_us += header.compute_us

    def so_far(self, replays: int) -> Traffic:
        return Traffic(
            answers=self._answers,
            replays=replays,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            adapter_bytes_up=self._adapter_bytes_up,
            adapter_bytes_down=self._adapter_bytes_down,
            queue_seconds=self._queue_us / 1e6,
            compute_seconds=self._compute_us / 1e6,
        )
