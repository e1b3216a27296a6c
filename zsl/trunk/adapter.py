"""Adapter of a session in the trunk's layers: one version, as it came from the wire. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from zsl.wire.adapter_layout import AdapterLayout
from zsl.wire.messages import AdapterSum, FloatDtypeName


@dataclass(slots=True, eq=False)
class GradientSum:
    """Sum of the gradients of `added` backwards. `total` is the computation's."""

    name: int
    added: int
    total: object = field(repr=False)


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """A complete and checked version. `weights`: flat, in the order of the layout, in `dtype`, finite; writable memory
    at an address that is aligned as torch's tensors are. `layout_digest`: SHA-256 of the layout as it came.

    `loaded` is the computation's own form of it, which its thread makes at the first use; `sum` is the last sum of its
    gradients.
    """

    version: bytes
    layout: AdapterLayout
    dtype: FloatDtypeName
    weights: bytearray | memoryview
    layout_digest: bytes = b""
    loaded: object | None = field(default=None, repr=False)
    sum: GradientSum | None = None


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter version as a request runs with it.

    `gradients`: the backward answers with those of its weights. `sum`: it adds them to this sum, and answers with that.
    """

    version: AdapterVersion
    dropout_seed: int | None = None
    gradients: bool = False
    sum: AdapterSum | None = None

    @property
    def trains(self) -> bool:
        """True if the gradients of the weights are computed."""
        return self.gradients or self.sum is not None
