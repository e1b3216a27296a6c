"""Settings of a daemon: the trunk that it serves, its limits and policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from zsl.errors import ConfigError, WrongModelError
from zsl.trunk.adapter import AdapterUse
from zsl.trunk.costs import (
    MAX_BATCH_TOKENS,
    UNKNOWN_GRAPH_MEMORY,
    UNKNOWN_PASS_MEMORY,
    BatchLimits,
    CacheMemory,
    Costs,
    GraphMemory,
    PassMemory,
)
from zsl.trunk.stash_memory import MOST_BYTES
from zsl.wire.frames import MAX_HEADER_BYTES, Frame
from zsl.wire.messages import (
    GRADIENTS_OF,
    MAX_TENSOR_BYTES,
    AdapterLimits,
    Cut,
    FloatDtypeName,
    Hello,
    Limits,
    ModelIdentity,
    Quantization,
    Reveal,
    TensorDescriptor,
)

FP32_BYTES = 4
ADAPTER_SHARE = 1 / 4  # of the memory for adapters, that one version may take
# Memory of DoRA beyond that of LoRA, for each token and output of a linear layer. A graph keeps the outputs that it
# scales, and its product, in single precision; kernels copy, as in a layer's backward without it.
DORA_BYTES, DORA_PEAK_BYTES = 8, 13


@dataclass(frozen=True, slots=True)
class TrunkInfo:
    """The served model and cut, as WELCOME and STATUS state them.

    `reveals`: the tensors from inside the trunk that its owner lets clients ask for.
    """

    model: ModelIdentity
    cut: Cut
    dtype: FloatDtypeName
    forward_only: bool
    max_row_tokens: int
    quantization: Quantization | None = None
    reveals: tuple[Reveal, ...] = ()


@dataclass(frozen=True, slots=True)
class TrunkTraits:
    """Traits of a loaded trunk: size, capabilities, costs and memory of its passes.

    `merges`: requests may share a pass. `packs`: requests of different lengths may share one too; `packs_masks`,
    `packs_restarts`: also those with a mask, or with positions that start again within a row. `deterministic`: a
    request's answer is the same bit for bit, whichever requests share its pass. `adaptable`: inputs and outputs of the
    linear modules that may have adapters, by path (`zsl.wire.adapter_layout`); `merges_adapters`: requests with
    adapters may share a pass. `key_sizes`: heads of each layer's keys and values, and their size, by path; empty if
    they may have no prefix. `graph_memory_with_adapters`, `pass_memory_with_adapters`: memory of passes of requests
    with adapters. `routers`: number of the layers with experts, and experts of each; counted for a trunk that reveals
    their logits. `weight_norms`: norms of the rows of the weights of the `adaptable` modules, as they are answered.
    `weight_bytes`: size of the weights in memory.
    `cache_memory`: of keys and values; None for a trunk whose layers keep others, or something else. `merges_caches`:
    requests with caches may share a pass.
    """

    parameters: int
    merges: bool
    packs: bool
    deterministic: bool
    costs: Costs
    batch_limits: BatchLimits
    packs_masks: bool = False
    packs_restarts: bool = False
    graph_memory: GraphMemory = UNKNOWN_GRAPH_MEMORY
    pass_memory: PassMemory = UNKNOWN_PASS_MEMORY
    adaptable: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    key_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    merges_adapters: bool = False
    graph_memory_with_adapters: GraphMemory = UNKNOWN_GRAPH_MEMORY
    pass_memory_with_adapters: PassMemory = UNKNOWN_PASS_MEMORY
    routers: tuple[int, int] = (0, 0)
    weight_norms: Mapping[str, tuple[TensorDescriptor, Frame]] = field(default_factory=dict)
    cache_memory: CacheMemory | None = None
    merges_caches: bool = False
    weight_bytes: int = 0

    def memory_of(self, uses: Iterable[AdapterUse | None]) -> tuple[GraphMemory, PassMemory]:
        """Return the memory of a pass of requests with these adapters, or without."""
        layouts = [use.version.layout for use in uses if use is not None]
        if not layouts:
            return self.graph_memory, self.pass_memory
        graph, by_layers = self.graph_memory_with_adapters, self.pass_memory_with_adapters
        if any(layout.magnitudes for layout in layouts):
            outputs = Counter[str]()  # by layer
            for path, (_, of_module) in self.adaptable.items():
                outputs[path.partition(".")[0]] += of_module
            graph = graph.plus(DORA_BYTES * outputs.total())
            by_layers = replace(by_layers, layer=by_layers.layer.plus(DORA_PEAK_BYTES * max(outputs.values())))
        return graph, by_layers


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The limits and policies of a server.

    `stash_memory_bytes`: memory of the stashes of pending backwards; over it, graphs and then inputs are evicted.
    `saves_graphs`: graphs are held only within `default_graph_memory`, or those of a single request.
    `reply_memory_bytes`: memory of answers that a client may ask for again.
    `adapter_memory_bytes`: memory of adapters in the trunk's layers, of which a version may take `ADAPTER_SHARE`; 0:
    none are accepted.
    `cache_memory_bytes`: memory of keys and values; 0: none are kept.
    `max_wait_seconds`: a request that has waited so long runs next, regardless of fairness.
    `decode_share`: part of the device's time for decoding while training waits too, between 0 and 1.
    `stuck_seconds`: a pass that takes longer is considered hung; the daemon exits, so that another can take over.
    A session uses two connections: one for requests, one for heartbeats.
    """

    lease_seconds: float = 60.0
    ping_seconds: float = 2.0
    max_request_tokens: int = 32_768
    max_sessions: int = 2048
    max_connections: int = 2 * 2048 + 64
    max_inflight_requests: int = 32
    max_inflight_bytes: int = 2 << 30
    max_total_inflight_bytes: int = 8 << 30
    max_wait_seconds: float = 10.0
    decode_share: float = 0.5
    stash_memory_bytes: int = MOST_BYTES
    saves_graphs: bool = False
    reply_memory_bytes: int = 64 << 20
    adapter_memory_bytes: int = 1 << 30
    max_adapter_rank: int = 256
    cache_memory_bytes: int = 4 << 30
    stuck_seconds: float = 1800.0
    drain_seconds: float = 10.0

    def limits(self, info: TrunkInfo) -> Limits:
        """Return the limits that WELCOME states."""
        return Limits(
            max_message_bytes=min(self.max_request_tokens * info.model.hidden_size * FP32_BYTES, MAX_TENSOR_BYTES),
            max_header_bytes=MAX_HEADER_BYTES,
            max_request_tokens=self.max_request_tokens,
            max_row_tokens=info.max_row_tokens,
            max_inflight_requests=self.max_inflight_requests,
            max_inflight_bytes=self.max_inflight_bytes,
            lease_ms=round(self.lease_seconds * 1000),
            ping_ms=round(self.ping_seconds * 1000),
        )

    def adapter_limits(self, traits: TrunkTraits) -> AdapterLimits | None:
        """Return the limits of an adapter; None if this daemon or its trunk accepts none."""
        most = min(int(self.adapter_memory_bytes * ADAPTER_SHARE), MAX_TENSOR_BYTES)
        if not most or not traits.adaptable:
            return None
        return AdapterLimits(max_rank=self.max_adapter_rank, max_bytes=most)

    def granted_tokens(self, info: TrunkInfo, memory: PassMemory) -> int:
        """Return the tokens of the largest request that fits in memory, at least `MAX_BATCH_TOKENS`."""
        least, most = min(MAX_BATCH_TOKENS, self.max_request_tokens), self.max_request_tokens
        return memory.most_tokens(self.stash_memory_bytes, info.max_row_tokens, least=least, most=most)


def parse_reveals(text: str) -> tuple[Reveal, ...]:
    """Parse names such as `hidden-states,router-logits`, or none. Raises `ConfigError`."""
    known: dict[str, Reveal] = {name.replace("_", "-"): name for name in GRADIENTS_OF}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"--reveal {name!r}: one or more of {', '.join(known)}, separated by commas")
    return tuple(reveal for name, reveal in known.items() if name in names)


def check_wanted(info: TrunkInfo, hello: Hello) -> None:
    """Raise `WrongModelError`, naming the difference, if a client wants another model or cut than the served one."""
    if hello.model is not None and hello.model != info.model:
        raise WrongModelError(_difference(info.model, hello.model))
    if hello.cut is not None and hello.cut != info.cut:
        raise WrongModelError(f"this daemon serves the cut {info.cut}, the client wants {hello.cut}")


def _difference(served: ModelIdentity, wanted: ModelIdentity) -> str:
    """Describe the first difference between two identities, readable fields before digests."""
    for name, text in (("model_type", "type {}"), ("layers", "{} layers"), ("hidden_size", "hidden size {}")):
        ours, theirs = text.format(getattr(served, name)), text.format(getattr(wanted, name))
        if ours != theirs:
            return f"this daemon serves a model of {ours}, the client's is of {theirs}: load the same model"
    if served.weights_digest != wanted.weights_digest:
        what, ours, theirs = "other weights", served.weights_digest, wanted.weights_digest
    else:
        what, ours, theirs = "another configuration", served.config_digest, wanted.config_digest
    return (
        f"both sides have a {served.model_type} of this size, but {what} "
        f"(digest {ours[:12]}… at the daemon, {theirs[:12]}… at the client): load the same checkpoint"
    )
