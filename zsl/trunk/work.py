"""What the parts of the daemon hand to each other: a request to compute, its outcome, and what is kept of it.

No torch, no sockets: the scheduler, the sessions and the server see a computation only through these.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from zsl.errors import WireError
from zsl.trunk.settings import TrunkTraits
from zsl.wire.frames import Frame
from zsl.wire.messages import Role, TensorDescriptor

Buffers = dict[Role, tuple[TensorDescriptor, Frame]]


class Kind(Enum):
    """The two things that a trunk computes. A pass is one or the other, never both."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Keep(Enum):
    """What of a forward is kept for its backward, from the least to the most."""

    NOTHING = 0
    INPUT = 1  # the backward computes the forward again
    PRODUCTS = 2  # and what the linear layers gave: it computes only what is between them again
    GRAPH = 3  # autograd's graph instead: the backward goes at once, with those that shared the forward or not at all
    GRAPH_AND_PRODUCTS = 4  # whichever the backward can use


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows and tokens of a request, and the lengths of the sequences in it, in order.

    `packable`: its sequences are whole and apart, so that they may stand in a packed pass beside others.
    """

    rows: int
    tokens: int
    lengths: tuple[int, ...]
    packable: bool = True

    @property
    def total_tokens(self) -> int:
        return self.rows * self.tokens


class Stash(Protocol):
    """What the trunk keeps for a pending backward. Opaque but for its size."""

    @property
    def nbytes(self) -> int: ...

    @property
    def keep(self) -> Keep:
        """What is kept."""
        ...

    def demoted(self) -> Stash | None:
        """What is left when the costliest thing in it is given up; None if that was the input."""
        ...

    def drop(self) -> None:
        """It will not be used; what it shares with others may be given up."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A stash in its session, with the shape of its step and the key under which its backward merges."""

    stash: Stash
    shape: Shape
    merge_key: Hashable


@dataclass(frozen=True, slots=True)
class Work:
    """One checked request. A backward has either a `stash` or its own activations among the buffers."""

    kind: Kind
    buffers: Buffers
    shape: Shape
    keep: Keep = Keep.NOTHING
    stash: Stash | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A computed answer, and what was kept of it."""

    buffers: Buffers
    stash: Stash | None = None


Outcome = Done | WireError


class Compute(Protocol):
    """What does the work: the torch trunk, or an echo in tests. Called from one thread, never from the loop."""

    @property
    def traits(self) -> TrunkTraits: ...

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        """One outcome for each of the works, all of one kind and mergeable. Never raises."""
        ...
