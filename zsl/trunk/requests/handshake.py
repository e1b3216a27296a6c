"""Handshake: build the answers WELCOME and STATUS, which need no session."""

from __future__ import annotations

import zsl
from zsl.trunk.settings import TrunkInfo, TrunkTraits
from zsl.wire.messages import AdapterLimits, Hello, Limits, Status, StatusRequest, Welcome


def welcome_to(
    hello: Hello,
    session: bytes,
    epoch: bytes,
    info: TrunkInfo,
    traits: TrunkTraits,
    adapters: AdapterLimits | None,
    limits: Limits,
    connection: bytes | None = None,
    *,
    caches: bool,
) -> Welcome:
    """Build the WELCOME of an open session. `connection`: its digest."""
    return Welcome(
        request=hello.request,
        software=zsl.__version__,
        epoch=epoch,
        session=session,
        model=info.model,
        cut=info.cut,
        dtype=info.dtype,
        quantization=info.quantization,
        forward_only=info.forward_only,
        packs=traits.packs,
        deterministic=traits.deterministic,
        trunk_parameters=traits.parameters,
        adapters=adapters,
        reveals=list(info.reveals),
        caches=caches,
        limits=limits,
        connection=connection,
    )


def status_for(
    asked: StatusRequest,
    epoch: bytes,
    info: TrunkInfo,
    traits: TrunkTraits,
    *,
    sessions: int,
    queued_requests: int,
    held_bytes: int,
    adapter_bytes: int,
    cache_bytes: int,
) -> Status:
    """Build the STATUS: the served trunk, and the load of the daemon."""
    return Status(
        request=asked.request,
        software=zsl.__version__,
        epoch=epoch,
        model=info.model,
        cut=info.cut,
        dtype=info.dtype,
        quantization=info.quantization,
        forward_only=info.forward_only,
        trunk_parameters=traits.parameters,
        sessions=sessions,
        queued_requests=queued_requests,
        held_bytes=held_bytes,
        adapter_bytes=adapter_bytes,
        cache_bytes=cache_bytes,
    )
