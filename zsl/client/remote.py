"""`RemoteTrunk`: the module that stands in the first slot of the hole, and its place in autograd.

It is called as a decoder layer is called, by the real transformers model, and has no parameters and no buffers.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
from torch.autograd import forward_ad

from zsl.client.crossing import CallInputs, PaddingMode, crossing_of
from zsl.client.overlap import current_lane
from zsl.client.trunk_client import CONNECT_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS, TrunkClient
from zsl.client.trunk_function import Call, CrossingEvent
from zsl.errors import ConfigError, ModelError, WrongModelError
from zsl.link.connection import after_fork
from zsl.link.endpoints import parse_endpoints
from zsl.link.keys import read_client_keys
from zsl.link.pending import check_timeouts
from zsl.split.no_weights import NoWeights
from zsl.wire.messages import Cut, ModelIdentity, Welcome
from zsl.wire.tensors import TORCH_DTYPES, float_wire_name

GradientMode = Literal["exact", "straight-through", "none"]


class RemoteTrunk(NoWeights):
    """The layers `[start, stop)` of a model, computed by the daemon at `endpoint`.

    `endpoint` may be several, with commas between them, of daemons that serve the same trunk: when one is gone, the
    next is taken. For daemons that encrypt: `server_key` is the daemon's `.key` file or the key itself, `client_key`
    one's own `.key_secret` file.

    `mode` says what gradient the layers in front of the trunk get:

    - `exact`: the trunk's own vector-Jacobian product, from the daemon.
    - `straight-through`: the gradient behind the trunk, as if the trunk were the identity. Half the traffic, an
      approximation; experimental.
    - `none`: none. Only the layers behind the trunk learn.

    A daemon that serves forward only has `none` in force where `exact` was asked for (`effective_mode`).

    `wire_dtype`: what activations and gradients are sent in, if not in the model's own dtype: bfloat16 halves the
    bytes of float32, at the price of its precision. `deterministic="packed"`: refuse a daemon whose answers may depend,
    by rounding, on who else it serves. `padding="send"`: padding behind real tokens crosses too, so that a padded
    batch has the local model's bits, and its logits at padded positions; "drop" leaves it out.

    A context manager, which closes it. Safe to call from several threads. A copy shares the connection, a pickle
    leaves it behind and connects again.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | None = None,
        client_key: str | None = None,
        mode: GradientMode = "exact",
        wire_dtype: torch.dtype | None = None,
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
        if wire_dtype is not None:
            float_wire_name(wire_dtype)  # raises for one that does not travel
        self.deterministic = deterministic
        self.padding: PaddingMode = padding
        self._how: dict[str, Any] = {
            "server_key": server_key,
            "client_key": client_key,  # the path, not what is in it
            "connect_timeout_seconds": connect_timeout_seconds,
            "request_timeout_seconds": request_timeout_seconds,
        }
        read_client_keys(server_key, client_key)  # raises for what is missing
        self._wanted: tuple[ModelIdentity | None, Cut | None, torch.dtype] = (None, None, torch.float32)
        self.in_model = False  # set where the model brings mask and positions by `observe_inputs`
        self._warned_of_autocast = False
        self._client: TrunkClient | None = None
        self._connecting = threading.Lock()
        self._pid: int | None = None  # of the process that connected first, or began to
        self._call = threading.local()
        # Called when a batch is ready to go to the trunk and when it has come back, forward and backward, by the thread
        # that waits for it; not where several micro-batches are under way at once.
        self.on_crossing: Callable[[CrossingEvent], None] = _nothing

    # --- the connection ----------------------------------------------------------------------------------------

    def connect(
        self, model: ModelIdentity | None = None, *, cut: Cut | None = None, dtype: torch.dtype = torch.float32
    ) -> Welcome:
        """Open the session, for this model, cut and dtype of activations; `load_client` does it.

        Warns where no gradient will pass the trunk.
        Raises `TrunkUnreachable`, `TrunkAuthError`, `WrongModelError` or another `WireError`.
        """
        if self._client is None:
            self._wanted = (model, cut, dtype)
        welcome = self.client.welcome
        if self.deterministic and not welcome.deterministic:
            raise WrongModelError(
                f"the trunk at {self.endpoint} is not deterministic; start it with --deterministic "
                f"{self.deterministic}, or leave out deterministic"
            )
        if self._wanted != (model, cut, dtype):
            fits = model in (None, welcome.model) and cut in (None, welcome.cut)
            if not fits:
                raise WrongModelError(
                    f"this RemoteTrunk is connected for another model or cut ({welcome.model.model_type}, "
                    f"{welcome.cut}); make a RemoteTrunk of its own for each"
                )
        if welcome.forward_only and self.mode == "exact":
            warnings.warn(
                f"the trunk at {self.endpoint} serves forward only: mode 'none' is in force, and everything in front "
                "of the trunk learns nothing",
                stacklevel=2,
            )
        elif self.mode == "none":
            warnings.warn(
                "mode is 'none': no gradient passes the trunk, and everything in front of it learns nothing",
                stacklevel=2,
            )
        if TORCH_DTYPES[welcome.dtype] != dtype:
            warnings.warn(
                f"the trunk at {self.endpoint} computes in {TORCH_DTYPES[welcome.dtype]}, this model in {dtype}: "
                "losses will differ from the local model's",
                stacklevel=2,
            )
        return welcome

    @property
    def client(self) -> TrunkClient:
        """The connection; opened if it is not. Raises `ClosedError` in the child of a fork that came meanwhile."""
        this_process = os.getpid()
        if self._pid is None:
            self._pid = this_process
        elif self._pid != this_process and self._client is None:  # the lock may have been copied locked
            raise after_fork(self.endpoint, self._pid)
        with self._connecting:
            if self._client is None:
                model, cut, dtype = self._wanted
                wire_dtype = float_wire_name(self.wire_dtype or dtype)
                client = TrunkClient(self.endpoint, model=model, cut=cut, dtype=wire_dtype, **self._how)
                try:
                    client.connect()
                except BaseException:
                    client.close()
                    raise
                self._client = client
            return self._client

    @property
    def effective_mode(self) -> GradientMode:
        """The mode in force: `mode`, or `none` in place of `exact` at a daemon that serves forward only."""
        if self.mode == "exact" and self._client is not None and self._client.welcome.forward_only:
            return "none"
        return self.mode

    def close(self) -> None:
        """End the session."""
        if self._client is not None:
            self._client.close()

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
    ) -> None:
        """Remember the arguments of the model's call, for the trunk that rebuilds masks and positions of them.

        The mask `[rows, tokens]` does not reach a layer, so a hook on the model brings it here; see `load_client`.
        """
        self._call.inputs = CallInputs(attention_mask, position_ids, labels)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what waits for a daemon is no graph
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Activations `[rows, tokens, hidden]` through the trunk; same shape, dtype and device.

        Raises `ZslError`. What a decoder layer gets beside them is rebuilt by the trunk and ignored here.
        """
        # Used once: what another call was made with must never stand in for this one's.
        inputs: CallInputs | None = self._call.__dict__.pop("inputs", None)
        if inputs is None and self.in_model:
            raise ModelError(
                "the model ran its layers without the call that brings mask and positions; zsl cannot split it"
            )
        crossing = crossing_of(
            inputs or CallInputs(),
            hidden_states,
            self.wire_dtype or hidden_states.dtype,
            packs=self.client.welcome.packs,
            padding=self.padding,
        )
        if forward_ad.unpack_dual(hidden_states).tangent is not None:
            raise ModelError("forward-mode differentiation does not pass the trunk; use backward")
        self._warn_of_autocast(hidden_states)
        call = Call(self.client, crossing, self.effective_mode == "exact", self.on_crossing)
        if not (torch.is_grad_enabled() and hidden_states.requires_grad) or self.effective_mode == "none":
            return call.without_gradient(hidden_states)
        lane = current_lane()
        return call.with_gradient(hidden_states) if lane is None else call.in_lane(lane, hidden_states)

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
        if self._client is None:
            return f"{self.endpoint}, mode={self.mode}, not connected"
        welcome = self._client.welcome
        return f"{self.endpoint}, mode={self.effective_mode}, cut={welcome.cut}, session={welcome.session.hex()[:8]}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        copy.__setstate__(self.__getstate__())
        copy._client = self._client
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """All but the connection: that stays with its process."""
        return {
            **self.__dict__,
            "_client": None,
            "_pid": None,
            "_connecting": None,
            "_call": None,
            "on_crossing": _nothing,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._connecting = threading.Lock()
        self._call = threading.local()


def _nothing(event: CrossingEvent) -> None:
    pass
