"""Types of work: a computation, its outcome, and the stash for its backward.

The scheduler, the sessions and the server see a computation only through these. Imports no torch and no sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from zsl.errors import WireError
from zsl.trunk.adapter import AdapterUse
from zsl.trunk.settings import TrunkTraits
from zsl.wire.frames import Frame
from zsl.wire.messages import Reveal, Role, TensorDescriptor, UsedAdapter

Buffers = dict[Role, tuple[TensorDescriptor, Frame]]


class Kind(Enum):
    """Kinds of computation. All requests of a pass are of one kind."""

    FORWARD = "forward"
    BACKWARD = "backward"
    DECODE = "forward behind a cache"  # a step of a generation, its prompt, or a piece of that

    __hash__ = object.__hash__  # Enum's own is a call of Python, some thirty times a request


class Keep(Enum):
    """Parts of a forward to keep for its backward, in increasing order of memory."""

    NOTHING = 0
    INPUT = 1  # the backward recomputes the forward
    LINEAR_OUTPUTS = 2  # and the outputs of the linear layers: only the operations between them are recomputed
    GRAPH = 3  # autograd's graph instead: usable only if all requests of the forward come back in one backward
    GRAPH_AND_LINEAR_OUTPUTS = 4  # whichever the backward can use

    @property
    def has_graph(self) -> bool:
        return self in (Keep.GRAPH, Keep.GRAPH_AND_LINEAR_OUTPUTS)


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows and tokens of a request, and the lengths of its sequences, in order: its rows, or parts of rows.

    `masked`: indices of the sequences with masked tokens. `fits_rows`: no row is longer than the model's maximum
    position, or the request states its lengths.
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
    """A request that may not share a pass."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A request that may be packed: its sequences, of any lengths, in one row with those of other requests."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """A request that may be stacked along the row dimension with others of equal row length and optional tensors."""

    tokens: int
    has_mask: bool
    has_positions: bool


@dataclass(frozen=True, slots=True)
class BehindCache:
    """A request behind a cache that may be packed: its tokens in one row with those of others behind caches."""


Sharing = Alone | Packed | Stacked | BehindCache


class Stash(Protocol):
    """Data kept from a forward for its pending backward. Opaque except for its size."""

    @property
    def nbytes(self) -> int: ...

    @property
    def keep(self) -> Keep:
        """The part of the forward that is kept."""
        ...

    def demoted(self) -> Stash | None:
        """Drop the part that takes most memory, and return the rest; None if only the input was kept."""
        ...

    def drop(self) -> None:
        """Drop the stash, and the memory that it shares with stashes of the same forward."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A stash held in a session, with the shape of its step, the sharing of its backward, the adapter of both, and
    what the forward revealed."""

    stash: Stash
    shape: Shape
    sharing: Sharing
    adapter: UsedAdapter | None = None
    reveals: tuple[Reveal, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Keys and values that a session's forward runs behind.

    `kept`: those before the request, in the computation's own form; None for a new cache. The request runs behind the
    first `length` tokens of these `rows` (None: of all, in order). `nbytes`: size of the cache after it, of which
    `added_nbytes` are not shared with the one before.
    """

    name: int
    kept: object | None
    length: int
    rows: tuple[int, ...] | None
    nbytes: int
    added_nbytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """The computation of one valid request. A backward has a `stash`, or activations among its buffers.

    The outcome of a backward with `adapter.gradients` has `adapter_gradients` among its buffers: flat, in the dtype of
    the version's weights. `reveals`: tensors from inside the trunk that a forward answers with, or that have gradients
    in a backward. Such a request runs alone. `cache`: keys and values that a forward runs behind.
    """

    kind: Kind
    buffers: Buffers
    shape: Shape
    sharing: Sharing
    keep: Keep = Keep.NOTHING
    stash: Stash | None = None
    adapter: AdapterUse | None = None
    reveals: tuple[Reveal, ...] = ()
    cache: CacheUse | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The works of one pass: one, or several of equal kind and sharing. Raises `ValueError` for others.

    `by_layers`: backwards without graph build that of one layer at a time."""

    works: tuple[Work, ...]
    by_layers: bool = False

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
    """The tensors of an answer, the stash for its backward, and the cache after it in the computation's own form."""

    buffers: Buffers
    stash: Stash | None = None
    kept: object | None = None


Outcome = Done | WireError


class Compute(Protocol):
    """The computation: the torch trunk, or an echo in tests. Called from one thread, never from the event loop."""

    @property
    def traits(self) -> TrunkTraits: ...

    def run(self, batch: Batch) -> list[Outcome]:
        """Compute a batch, and return one outcome per work, in order. Never raises."""
        ...
