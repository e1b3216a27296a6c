"""`RemoteTrunk`: module that replaces the trunk's layers in a model and computes them on a daemon.

The transformers model calls it as a decoder layer. It has no weights and no buffers, but it may have the modules of the
layer in whose place it is, for adapters.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from torch.autograd import forward_ad
from transformers.cache_utils import Cache

from zsl.client.connect import GradientMode, LazyClient, Wanted, compare
from zsl.client.crossing import CallInputs, Crossing, PaddingMode, crossing_behind, crossing_of
from zsl.client.gradient_sum import current_micro_batch
from zsl.client.overlap import current_lane
from zsl.client.prefix import Prefix, prefix_tokens
from zsl.client.revealed import check_collected, check_reveals, collect
from zsl.client.trunk_adapters import Found, TrunkAdapters
from zsl.client.trunk_cache import cache_among, edit_of, note_untracked, trunk_cache_of
from zsl.client.trunk_client import CONNECT_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS, TrunkClient
from zsl.client.trunk_function import Call, CrossingEvent
from zsl.errors import ConfigError, ModelError
from zsl.link.endpoints import parse_endpoints
from zsl.link.keys import read_client_keys
from zsl.link.unanswered_requests import check_timeouts
from zsl.split.ghosts import WAY_OUT
from zsl.split.no_weights import NoWeights
from zsl.split.trunk_lora import Slots
from zsl.wire.messages import Cut, ModelIdentity, Quantization, Reveal, Welcome
from zsl.wire.tensors import TORCH_DTYPES, float_wire_name


@dataclass(frozen=True, slots=True)
class _Observed:
    """Findings of the hook on the model, for one forward of the trunk. `inside`: what of `asked` the trunk has.
    `behind_cache`: there are tokens before these in a cache."""

    inputs: CallInputs = field(default_factory=CallInputs)
    slots: Slots | None = None
    asked: tuple[Reveal, ...] = ()
    inside: tuple[Reveal, ...] = ()
    prefix: Prefix | None = None
    behind_cache: bool = False


class RemoteTrunk(NoWeights):
    """Layers `[start, stop)` of a model, computed by the daemon at `endpoint`.

    `endpoint` may be several, separated by commas, of daemons that serve the same trunk: if one is lost, the next is
    used. For daemons that encrypt: `server_key` is the daemon's `.key` file or the key itself, `client_key` the own
    `.key_secret` file.

    `mode`: gradient of the layers in front of the trunk:

    - `exact`: the trunk's own vector-Jacobian product, from the daemon.
    - `straight-through`: the gradient behind the trunk, as if the trunk were the identity. Half the traffic, an
      approximation; experimental.
    - `none`: no gradient. Only the layers behind the trunk learn.

    A daemon that serves forward only has `none` in force where `exact` was asked for (`effective_mode`).

    `wire_dtype`: dtype of sent activations and gradients, by default the model's: bfloat16 halves the bytes of float32,
    at the price of its precision. `adapter_wire_dtype`: dtype of sent adapters on the trunk's layers, and of their
    gradients, by default their own. `deterministic="packed"`: refuse a daemon whose answers may depend, by rounding, on
    the requests of other clients. `padding="send"`: send padding behind real tokens too, so that a padded batch has the
    local model's bits, and its logits at padded positions; "drop" leaves it out.

    A context manager, which closes it. Thread-safe. A copy shares the connection; an unpickled trunk connects again.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | None = None,
        client_key: str | None = None,
        mode: GradientMode = "exact",
        wire_dtype: torch.dtype | None = None,
        adapter_wire_dtype: torch.dtype | None = None,
        deterministic: Literal["packed"] | None = None,
        padding: PaddingMode = "drop",
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        super().__init__()
        for name, given, known in (("mode", mode, GradientMode), ("padding", padding, PaddingMode)):
            if given not in get_args(known):
                raise ConfigError(f"{name} {given!r}: one of {', '.join(get_args(known))}")
        check_timeouts(connect_timeout_seconds=connect_timeout_seconds, request_timeout_seconds=request_timeout_seconds)
        self.endpoint = ",".join(parse_endpoints(endpoint))
        self.mode: GradientMode = mode
        self.wire_dtype = wire_dtype
        self.adapter_wire_dtype = adapter_wire_dtype
        for dtype in (wire_dtype, adapter_wire_dtype):
            if dtype is not None:
                float_wire_name(dtype)  # raises for a dtype without a wire name
        self.deterministic = deterministic
        self.padding: PaddingMode = padding
        read_client_keys(server_key, client_key)  # raises for missing or invalid keys
        self._lazy_client = LazyClient(
            self.endpoint,
            server_key=server_key,
            client_key=client_key,  # the path, not the key
            connect_timeout_seconds=connect_timeout_seconds,
            request_timeout_seconds=request_timeout_seconds,
        )
        self.in_model = False  # True if the model passes mask and positions by `observe_inputs`
        self._warned_of_autocast = False
        self._call = threading.local()
        self._adapters = TrunkAdapters()
        # Called when a batch is ready to be sent and when it has come back, forward and backward, by the thread that
        # waits for it; not for overlapped micro-batches.
        self.on_crossing: Callable[[CrossingEvent], None] = _nothing

    # --- the connection ----------------------------------------------------------------------------------------

    def connect(
        self,
        model: ModelIdentity | None = None,
        *,
        cut: Cut | None = None,
        dtype: torch.dtype = torch.float32,
        quantize: Quantization | None = None,
    ) -> Welcome:
        """Open the session for this model, cut and dtype of activations. Called by `load_client`.

        Warns if no gradient will pass the trunk, or if it has another dtype or other bits than this model (`quantize`).
        Raises `TrunkUnreachable`, `TrunkAuthError`, `WrongModelError` or another `WireError`.
        """
        wanted = Wanted(model, cut, dtype)
        if self._lazy_client.client is None:
            self._lazy_client.wanted = wanted
        welcome = self.client.welcome
        compare(
            welcome,
            self.endpoint,
            connected_for=self._lazy_client.wanted,
            wanted=wanted,
            mode=self.mode,
            deterministic=self.deterministic,
            quantize=quantize,
        )
        return welcome

    @property
    def client(self) -> TrunkClient:
        """Client with an open session, connecting if needed. Raises `ClosedError` in a forked child."""
        return self._lazy_client.connected(self.wire_dtype)

    @property
    def effective_mode(self) -> GradientMode:
        """Mode in force: `mode`, or `none` instead of `exact` if the daemon serves forward only."""
        client = self._lazy_client.client
        if self.mode == "exact" and client is not None and client.welcome.forward_only:
            return "none"
        return self.mode

    def close(self) -> None:
        """End the session."""
        if self._lazy_client.client is not None:
            self._lazy_client.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the call ----------------------------------------------------------------------------------------------

    def observe_inputs(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: tuple[torch.Tensor, ...] = (),
        slots: Slots | None = None,
        reveal: tuple[Reveal, ...] = (),
        prefix: Prefix | None = None,
        *,
        behind_cache: bool = False,
    ) -> None:
        """Keep arguments of the model's call for this thread's next `forward`: the trunk rebuilds mask and positions.

        The mask `[rows, tokens]` is not passed to layers, so a hook on the model calls this; see `load_client`.
        `slots`: the modules in the places of the trunk's layers, whose adapters are sent. `reveal`: tensors from inside
        the trunk that the model is asked for. `prefix`: keys and values in front of those of the trunk's layers.
        `behind_cache`: the call has a cache with tokens. Raises `ModelError` for tensors that the trunk keeps.
        """
        inside: tuple[Reveal, ...] = ()
        if reveal:  # torch.compile traces this, and cannot trace the rest
            welcome = self.client.welcome
            inside = tuple(
                name for name in reveal if name != "hidden_states" or welcome.cut.stop - welcome.cut.start > 1
            )
            check_reveals(inside, welcome.reveals, self.endpoint)
        inputs = CallInputs(attention_mask, position_ids, labels)
        self._call.observed = _Observed(inputs, slots, reveal, inside, prefix, behind_cache)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # waiting for a daemon cannot be traced
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run activations `[rows, tokens, hidden]` through the trunk. Return the same shape, dtype and device.

        Raises `ZslError`. Other arguments of a decoder layer are ignored: the trunk rebuilds them.
        """
        # Used once, so that no later call gets the inputs of an earlier one.
        observed: _Observed | None = self._call.__dict__.pop("observed", None)
        if observed is None and self.in_model:
            raise ModelError(
                "the model ran its layers without the call that brings mask and positions; zsl cannot split it"
            )
        observed = observed or _Observed()
        adapters, reveal = self._found_adapters(observed), observed.inside
        check_collected(observed.asked)
        mode = self.effective_mode
        weights = None if adapters is None or mode != "exact" else adapters.weights
        learns = hidden_states.requires_grad or (weights is not None and weights.requires_grad)
        learns = learns and torch.is_grad_enabled() and mode != "none"
        cache = self._cache(observed, args, kwargs, hidden_states if learns else None)
        crossing = self._crossing(observed, hidden_states, cache)
        if forward_ad.unpack_dual(hidden_states).tangent is not None:
            raise ModelError("forward-mode differentiation does not pass the trunk; use backward")
        self._warn_of_autocast(hidden_states)
        adapter = None if adapters is None else self._adapters.for_call(adapters, self.adapter_wire_dtype)
        # A sum of several backwards takes no other gradients, and the graph of a prefix's encoder ends with the first.
        micro_batch = None if reveal or observed.prefix else current_micro_batch()
        call = Call(self.client, crossing, mode == "exact", self.on_crossing, adapter, micro_batch, reveal)
        lane = current_lane()
        if cache is not None:
            output, *revealed = call.behind(cache, hidden_states)
        elif not learns:
            output, *revealed = call.without_gradient(hidden_states)
        elif reveal and (lane is not None or mode != "exact"):
            why = f"mode {mode!r}" if lane is None else "micro-batches in flight (overlap)"
            raise ModelError(f"the trunk's {' and '.join(reveal).replace('_', ' ')} have no gradient with {why}")
        elif lane is not None and observed.prefix:  # its encoder is in the graphs of bottom, trunk and top
            raise ModelError("a prefix has no gradient with micro-batches in flight (overlap)")
        elif lane is None:
            output, *revealed = call.with_gradient(hidden_states, weights)
        else:
            return call.in_lane(lane, hidden_states, weights)
        collect(observed.asked, dict(zip(reveal, revealed, strict=True)), hidden_states, output)
        return output

    def _cache(
        self, observed: _Observed, args: tuple[Any, ...], kwargs: dict[str, Any], learning: torch.Tensor | None
    ) -> Cache | None:
        """Return the cache to run behind: none for a batch that is `learning`. Raises `ModelError`."""
        if observed.prefix:
            return None
        cache, welcome = cache_among(args, kwargs, expected=observed.behind_cache), self.client.welcome
        if cache is None:
            return None
        if learning is not None:
            note_untracked(cache, welcome.cut, learning)
            return None
        if not welcome.caches:
            raise ModelError(
                f"the trunk at {self.endpoint} keeps no keys and values: pass use_cache=False, or start it with "
                "--cache-memory (it keeps none of layers with another state)"
            )
        return cache

    def _crossing(self, observed: _Observed, hidden_states: torch.Tensor, cache: Cache | None) -> Crossing:
        """Choose how a batch is sent. Raises `ModelError` for a mask or positions that cannot cross."""
        welcome, wire_dtype = self.client.welcome, self.wire_dtype or hidden_states.dtype
        if cache is not None:
            trunk_cache_of(cache, welcome.cut)
            past, _ = edit_of(cache, welcome.cut)
            return crossing_behind(observed.inputs, hidden_states, wire_dtype, past=past)
        return crossing_of(
            observed.inputs,
            hidden_states,
            wire_dtype,
            packs=welcome.packs,
            padding="send" if observed.inside else self.padding,  # revealed at padded positions too
            prefix_tokens=prefix_tokens(observed.prefix),
        )

    def _found_adapters(self, observed: _Observed) -> Found | None:
        """Return the adapters on the trunk's layers. Raises `ZslError` for those that the daemon would not train."""
        if observed.prefix and not self.has_modules:
            raise ModelError(
                'past_key_values has a prefix for the trunk\'s layers, and layers="client" leaves them out: for prefix '
                'tuning use load_client(..., layers="all")'
            )
        found = None if observed.slots is None else self._adapters.find(observed.slots, observed.prefix)
        if found is None:
            return None
        found.check_limits(self.client.welcome.adapters, self.adapter_wire_dtype)
        if self.training and found.weights.requires_grad and self.effective_mode != "exact":
            why = "its mode" if self.mode != "exact" else "the daemon serves forward only, so the mode in force"
            raise ModelError(
                f"the adapters on the trunk's layers would learn nothing, as {why} is {self.effective_mode!r}: use a "
                f"daemon with gradients and mode='exact', or {WAY_OUT}"
            )
        return found

    def _warn_of_autocast(self, hidden_states: torch.Tensor) -> None:
        """Warn, once, that the trunk does not compute under the caller's autocast."""
        device = hidden_states.device.type
        if self._warned_of_autocast or not torch.is_autocast_enabled(device):
            return
        self._warned_of_autocast = True
        warnings.warn(
            f"autocast to {torch.get_autocast_dtype(device)} does not reach the trunk, which computes in "
            f"{TORCH_DTYPES[self.client.welcome.dtype]}: losses and weights will differ from the local model's. For "
            "its numbers leave autocast out (bf16=False, fp16=False in a Trainer's arguments)",
            stacklevel=1,
        )

    def extra_repr(self) -> str:
        if self._lazy_client.client is None:
            return f"{self.endpoint}, mode={self.mode}, not connected"
        welcome = self._lazy_client.client.welcome
        return f"{self.endpoint}, mode={self.effective_mode}, cut={welcome.cut}, session={welcome.session.hex()[:8]}"

    @property
    def has_modules(self) -> bool:
        """True if it has the modules of a model's layer, for adapters."""
        return bool(self._modules or self._parameters)

    def without_modules(self) -> Self:
        """Return a copy without the modules of a model's layer, on the same connection."""
        return copy.deepcopy(self, {id(self._modules): {}, id(self._parameters): {}})

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes but those of this object alone."""
        return {**self.__dict__, "_call": None, "_adapters": None, "on_crossing": _nothing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._call = threading.local()
        self._adapters = TrunkAdapters()


def _nothing(event: CrossingEvent) -> None:
    pass
