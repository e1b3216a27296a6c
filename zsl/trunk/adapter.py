"""Adapter of a session in the trunk's layers: one version, as it came from the wire. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from zsl.wire.adapter_layout import AdapterLayout
from zsl.wire.messages import FloatDtypeName


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """A complete and checked version. `weights`: flat, in the order of the layout, in `dtype`, finite; writable memory
    at an address that is aligned as torch's tensors are.

    `loaded` is the computation's own form of it, which its thread makes at the first use.
    """

    version: bytes
    layout: AdapterLayout
    dtype: FloatDtypeName
    weights: bytearray | memoryview
    loaded: object | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return len(self.weights)


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter version as a request runs with it. `gradients`: the backward answers with those of its weights."""

    version: AdapterVersion
    dropout_seed: int | None = None
    gradients: bool = False
