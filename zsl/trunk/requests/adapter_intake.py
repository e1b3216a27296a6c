"""Receive the adapter versions of sessions in pieces, and check them against the trunk's modules.

Imports no sockets; time is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zsl.errors import AdapterError, BadShapeError, MalformedError, NonFiniteError, TooLargeError
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.adapter import AdapterUse, AdapterVersion
from zsl.trunk.requests.finite import not_finite
from zsl.trunk.sessions.adapter_store import AdapterStore
from zsl.trunk.sessions.sessions import Session
from zsl.wire.adapter_layout import (
    AdaptedModule,
    AdapterLayout,
    LoraModule,
    PrefixLayer,
    VersionDigest,
    decode_layout,
)
from zsl.wire.frames import ALIGNMENT_BYTES, Frame
from zsl.wire.messages import DTYPE_BYTES, Adapter, AdapterLimits, Backward, Forward, TensorDescriptor

Sizes = tuple[int, int]  # inputs and outputs of a linear module, or heads of a layer's keys and their size
EncodedTensor = tuple[TensorDescriptor, Frame]


@dataclass(slots=True)
class _Arriving:
    """Version of which pieces have come, up to `received` bytes."""

    version: bytes
    layout: AdapterLayout
    layout_digest: bytes
    digest: VersionDigest
    weights: memoryview
    received: int = 0
    checked: int = 0  # bytes that are known to be finite


class AdapterIntake:
    """Adapter versions of all sessions.

    `adaptable`: sizes of the trunk's linear modules that may have adapters, by path. `key_sizes`: those of its layers'
    keys and values; empty if they may have no prefix. `weight_norms`: norms of the rows of the linear modules' weights,
    of which the client makes the first magnitudes of DoRA.
    """

    def __init__(
        self,
        store: AdapterStore,
        adaptable: Mapping[str, Sizes],
        key_sizes: Mapping[str, Sizes],
        weight_norms: Mapping[str, EncodedTensor],
        limits: AdapterLimits | None,
    ) -> None:
        self._store = store
        self._adaptable = adaptable
        self._key_sizes = key_sizes
        self._weight_norms = weight_norms
        self._limits = limits
        self._arriving: dict[bytes, _Arriving] = {}  # by session

    @property
    def nbytes(self) -> int:
        """Bytes of all versions, and of those that are arriving."""
        return self._store.nbytes

    def limits_of(self, tenant: Tenant | None) -> AdapterLimits | None:
        """Return the limits of a version, lowered to the tenant's; None if the daemon accepts no adapters."""
        if self._limits is None or tenant is None or tenant.max_adapter_bytes is None:
            return self._limits
        most = min(self._limits.max_bytes, tenant.max_adapter_bytes)
        return self._limits.model_copy(update={"max_bytes": most})

    def receive(self, session: Session, header: Adapter, frames: Sequence[Frame], now: float) -> None:
        """Take a piece of a version, which may be used when the last one has come.

        A piece of a version that was refused or displaced is ignored: the request that it precedes is answered with
        `UnknownAdapterError`. Raises `WireError`.
        """
        buffers = {d.role: frame for d, frame in zip(header.tensors, frames, strict=True)}
        expected = {"layout", "weights"} if header.offset == 0 else {"weights"}
        if buffers.keys() != expected or any(d.dtype != "u8" or len(d.shape) != 1 for d in header.tensors):
            raise MalformedError(f"a piece of an adapter has {', '.join(sorted(expected))}, of bytes")
        piece = buffers["weights"]
        if header.offset == 0:
            self._arriving.pop(session.id, None)
            if not self._begin(session, header, buffers["layout"], piece, now):
                return
        arriving = self._arriving.get(session.id)
        fits = arriving is not None and (arriving.version, arriving.received) == (header.version, header.offset)
        if arriving is None or not fits or not self._store.awaits(session, header.version):
            self._arriving.pop(session.id, None)
            return
        try:
            self._add(session, arriving, header, piece)
        except BaseException:
            self._forget(session)
            raise

    def weight_norms(self, session: Session, path: str) -> EncodedTensor:
        """Return the norms of the rows of a module's weight. Raises `AdapterError`."""
        self._limits_for(session)
        found = self._weight_norms.get(path)
        if found is None:
            raise _no_module(path)
        return found

    def use(self, session: Session, header: Forward | Backward, now: float) -> AdapterUse | None:
        """Return the adapter that a request runs with. Raises `UnknownAdapterError` or `MalformedError`."""
        gradients, sum_of_steps = False, None
        if isinstance(header, Backward):
            gradients, sum_of_steps = header.adapter_gradients, header.adapter_sum
        if header.adapter is None:
            if gradients or sum_of_steps:
                raise MalformedError("the gradients of an adapter are asked for, and none is named")
            return None
        version = self._store.get(session, header.adapter.version, now)
        return AdapterUse(version, header.adapter.dropout_seed, gradients, sum_of_steps)

    def close(self, session: Session) -> None:
        """Forget the versions of a closed session."""
        self._arriving.pop(session.id, None)
        self._store.close(session)

    def _limits_for(self, session: Session) -> AdapterLimits:
        limits = self.limits_of(session.tenant)
        if limits is None:
            raise AdapterError("this daemon accepts no adapters in the trunk's layers")
        return limits

    def _begin(self, session: Session, header: Adapter, layout_json: Frame, piece: Frame, now: float) -> bool:
        """Check a version's layout, and reserve its memory. False if the version is here already."""
        limits = self._limits_for(session)
        layout_digest = hashlib.sha256(layout_json).digest()
        layout = self._store.known_layout(session, layout_digest)  # as most optimizer steps have it again
        if layout is None:
            layout = decode_layout(layout_json)
            for module in layout.modules:
                self._check_module(module, limits)
            self._check_prefix(layout.prefix)
        if header.nbytes != layout.nbytes(header.dtype):
            raise BadShapeError(
                f"the layout takes {layout.nbytes(header.dtype)} bytes of {header.dtype}, not {header.nbytes}"
            )
        if header.nbytes > limits.max_bytes:
            raise TooLargeError(f"an adapter of {header.nbytes} bytes is over {limits.max_bytes}")
        # The computation keeps a copy, a sum of gradients, and for each element of a magnitude the norm of a row.
        norms_nbytes = layout.magnitudes * DTYPE_BYTES[layout.dtype]
        nbytes = header.nbytes + 2 * layout.nbytes(layout.dtype) + norms_nbytes
        if not self._store.reserve(session, header.version, nbytes, now):
            return False
        digest = VersionDigest(layout_json, header.dtype)
        weights = _whole(piece, header.nbytes) or _aligned(header.nbytes)
        self._arriving[session.id] = _Arriving(header.version, layout, layout_digest, digest, weights)
        return True

    def _check_module(self, module: AdaptedModule, limits: AdapterLimits) -> None:
        if isinstance(module, PrefixLayer):
            what, of, given = "layer for a prefix", "(heads, size) of keys and values", (module.heads, module.dim)
            sizes = self._key_sizes.get(module.path)
        else:
            what, of, given = "linear module", "(inputs, outputs)", (module.inputs, module.outputs)
            sizes = self._adaptable.get(module.path)
        if sizes is None:
            raise AdapterError(f"the trunk has no {what} {module.path!r}")
        if sizes != given:
            raise AdapterError(f"{module.path} has {of} {sizes}, not {given}")
        if isinstance(module, LoraModule) and module.rank > limits.max_rank:
            raise AdapterError(f"{module.path}: rank {module.rank} is over {limits.max_rank} (--max-adapter-rank)")

    def _check_prefix(self, prefix: Sequence[PrefixLayer]) -> None:
        if not prefix:
            return
        paths, sizes = [layer.path for layer in prefix], {(layer.rows, layer.tokens) for layer in prefix}
        if sorted(paths) != sorted(self._key_sizes) or len(sizes) > 1:
            raise AdapterError(
                "a prefix needs keys and values of equally many rows and tokens for each of the layers "
                f"{', '.join(self._key_sizes)}, once; these are for {', '.join(paths)}, of {sorted(sizes)}"
            )

    def _add(self, session: Session, arriving: _Arriving, header: Adapter, piece: Frame) -> None:
        end = arriving.received + len(piece)
        if not piece or end > len(arriving.weights) or header.nbytes != len(arriving.weights):
            raise BadShapeError(f"pieces of {end} bytes of an adapter of {len(arriving.weights)}")
        if piece is not arriving.weights:
            arriving.weights[arriving.received : end] = piece
        arriving.digest.update(piece)
        arriving.received = end
        whole = end - end % DTYPE_BYTES[header.dtype]
        if not_finite(header.dtype, arriving.weights[arriving.checked : whole]):
            raise NonFiniteError("weights of the adapter are not finite: look for a diverging loss")
        arriving.checked = whole
        if end < len(arriving.weights):
            return
        if arriving.digest.digest() != header.version:
            raise MalformedError("the adapter's version is not the digest of its layout and weights")
        del self._arriving[session.id]
        adapter = AdapterVersion(
            header.version, arriving.layout, header.dtype, arriving.weights, arriving.layout_digest
        )
        self._store.complete(session, adapter)

    def _forget(self, session: Session) -> None:
        arriving = self._arriving.pop(session.id, None)
        if arriving is not None:
            self._store.drop(session, arriving.version)


def _no_module(path: str) -> AdapterError:
    return AdapterError(f"the trunk has no linear module {path!r}")


def _whole(piece: Frame, nbytes: int) -> memoryview | None:
    """Return a piece that has all weights, in memory of its own in which torch would put a tensor."""
    if not isinstance(piece, memoryview) or piece.readonly or len(piece) != nbytes:
        return None
    return None if np.frombuffer(piece, np.uint8).ctypes.data % ALIGNMENT_BYTES else piece


def _aligned(nbytes: int) -> memoryview:
    """Allocate bytes at an address at which torch would put a tensor. Not initialized: all are written before any is
    read."""
    memory = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + nbytes].data
