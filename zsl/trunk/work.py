"""The types that the parts of the daemon exchange: a computation, its outcome, and the stash for its backward.

No torch, no sockets: the scheduler, the sessions and the server see a computation only through these.
"""

from __future__ import annotations

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
    """The part of a forward that is kept for its backward, from the least to the most."""

    NOTHING = 0
    INPUT = 1  # the backward computes the forward again
    LINEAR_OUTPUTS = 2  # and the outputs of the linear layers: it computes only the rest between them again
    GRAPH = 3  # autograd's graph instead: the backward goes at once, with those that shared the forward or not at all
    GRAPH_AND_LINEAR_OUTPUTS = 4  # whichever the backward can use

    @property
    def has_graph(self) -> bool:
        return self in (Keep.GRAPH, Keep.GRAPH_AND_LINEAR_OUTPUTS)


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows and tokens of a request, and the sequences in it, in order: its rows, or parts of rows.

    `masked`: the indices of the sequences with tokens that none may attend to. `fits_rows`: no row is longer than the
    model's positions, or the request says its lengths.
    """

    rows: int
    tokens: int
    lengths: tuple[int, ...]
    masked: frozenset[int] = frozenset()
    fits_rows: bool = True

    @property
    def total_tokens(self) -> int:
        return self.rows * self.tokens


@dataclass(frozen=True, slots=True)
class Alone:
    """A request that shares a pass with none."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A request whose sequences may stand in one row beside those of others, whatever the lengths."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """A request whose rows may stand on those of others of the same row shape that bring the same tensors along."""

    tokens: int
    has_mask: bool
    has_positions: bool


Sharing = Alone | Packed | Stacked


class Stash(Protocol):
    """The memory of a forward for its pending backward. Opaque but for its size."""

    @property
    def nbytes(self) -> int: ...

    @property
    def keep(self) -> Keep:
        """Say which part of the forward is kept."""
        ...

    def demoted(self) -> Stash | None:
        """Give up the costliest part, and return the rest; None if that was the input."""
        ...

    def drop(self) -> None:
        """Drop the stash; the memory that it shares with others may be given up."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A stash in its session, with the shape of its step and how its backward may share a pass."""

    stash: Stash
    shape: Shape
    sharing: Sharing


@dataclass(frozen=True, slots=True)
class Work:
    """One checked request. A backward has either a `stash` or its own activations among the buffers."""

    kind: Kind
    buffers: Buffers
    shape: Shape
    sharing: Sharing
    keep: Keep = Keep.NOTHING
    stash: Stash | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The works of one pass: one, or several of one kind that may share it in the same way.

    Raises `ValueError` for others.
    """

    works: tuple[Work, ...]

    def __post_init__(self) -> None:
        ways = {(work.kind, work.sharing) for work in self.works}
        if len(ways) != 1 or (len(self.works) > 1 and self.sharing == Alone()):
            raise ValueError(f"these requests may not share a pass: {ways}")

    @property
    def kind(self) -> Kind:
        return self.works[0].kind

    @property
    def sharing(self) -> Sharing:
        return self.works[0].sharing


@dataclass(frozen=True, slots=True)
class Done:
    """A computed answer, and the stash for its backward."""

    buffers: Buffers
    stash: Stash | None = None


Outcome = Done | WireError


class Compute(Protocol):
    """The computation: the torch trunk, or an echo in tests. Called from one thread, never from the loop."""

    @property
    def traits(self) -> TrunkTraits: ...

    def run(self, batch: Batch) -> list[Outcome]:
        """Compute a batch, and return an outcome for each of its works. Never raises."""
        ...
