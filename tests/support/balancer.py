"""A TCP balancer: each connection to it leads to one of several ports, in turn or at random."""

from __future__ import annotations

import random

from .faulty_link import FaultyLink


class Balancer(FaultyLink):
    """A `FaultyLink` with several targets. `seed` None takes them in turn."""

    def __init__(self, ports: list[int], *, seed: int | None = None) -> None:
        super().__init__(ports[0])
        self._ports = ports
        self._draw = None if seed is None else random.Random(seed)

    def next_port(self) -> int:
        if self._draw is not None:
            return self._draw.choice(self._ports)
        return self._ports[(self.accepted - 1) % len(self._ports)]
