"""`RemoteTrunk`: the module that stands in the first slot of the hole, and its place in autograd.

It is called as a decoder layer is called, by the real transformers model, and has no parameters and no buffers.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from zsl.client.connection import after_fork
from zsl.client.crossing import CallInputs, Crossing, PaddingMode, crossing_of
from zsl.client.endpoints import parse_endpoints
from zsl.client.keys import read_client_keys
from zsl.client.overlap import Deferred, Lane, current_lane
from zsl.client.requests import check_timeouts
from zsl.client.trunk_client import (
    CONNECT_TIMEOUT_SECONDS,
    REQUEST_TIMEOUT_SECONDS,
    TrunkClient,
    read_answer,
)
from zsl.errors import ConfigError, ModelError, WrongModelError
from zsl.split.no_weights import NoWeights
from zsl.wire.messages import Cut, ModelIdentity, Welcome
from zsl.wire.tensors import TORCH_DTYPES, float_wire_name

GradientMode = Literal["exact", "straight-through", "none"]
CrossingEvent = tuple[Literal["forward", "backward"], Literal["begins", "ended"]]


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

        A forward-only daemon turns the mode to `none`, with a warning.
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
                f"the trunk at {self.endpoint} serves forward only: mode is 'none', and everything in front of the "
                "trunk learns nothing",
                stacklevel=2,
            )
            self.mode = "none"
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
                client = TrunkClient(self.endpoint, **self._how)
                model, cut, dtype = self._wanted
                try:
                    client.connect(model, cut=cut, dtype=float_wire_name(self.wire_dtype or dtype))
                except BaseException:
                    client.close()
                    raise
                self._client = client
            return self._client

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
        wants_gradient = torch.is_grad_enabled() and hidden_states.requires_grad and self.mode != "none"
        lane = current_lane()
        if wants_gradient and lane is not None:
            return _through_lane(lane, self, crossing, hidden_states)
        if wants_gradient:
            output: torch.Tensor = _TrunkFunction.apply(hidden_states, self, crossing)  # type: ignore[no-untyped-call]
            return output
        client, activations = self.client, crossing.sent(hidden_states.detach())
        with _noted(self.on_crossing, "forward"):
            step = crossing.forward(client, activations, keep=False)
            return crossing.received(step.output, hidden_states)

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
        return f"{self.endpoint}, mode={self.mode}, cut={welcome.cut}, session={welcome.session.hex()[:8]}"

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


@contextmanager
def _noted(on_crossing: Callable[[CrossingEvent], None], direction: Literal["forward", "backward"]) -> Iterator[None]:
    on_crossing((direction, "begins"))
    yield
    on_crossing((direction, "ended"))


class _TrunkFunction(torch.autograd.Function):
    """The trunk in autograd. The trunk's input is saved as autograd saves tensors, so that `retain_graph`, a second
    backward and the freeing of memory are as with any other operation."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, remote: RemoteTrunk, crossing: Crossing) -> torch.Tensor:
        ctx.exact = remote.mode == "exact"
        ctx.on_crossing, ctx.crossing = remote.on_crossing, crossing
        client, activations = remote.client, crossing.sent(hidden_states.detach())
        with _noted(remote.on_crossing, "forward"):
            step = crossing.forward(client, activations, keep=ctx.exact)
            output = crossing.received(step.output, hidden_states)
        if ctx.exact:
            ctx.save_for_backward(hidden_states)
            step.forget_tensors()
            ctx.client, ctx.step = client, step
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        crossing: Crossing = ctx.crossing
        crossing.check_gradients(gradients)
        if not ctx.exact:
            ctx.on_crossing(("backward", "ended"))
            return gradients, None, None
        (hidden_states,) = ctx.saved_tensors
        sent, activations = crossing.sent(gradients), crossing.sent(hidden_states.detach())
        with _noted(ctx.on_crossing, "backward"):
            answer = ctx.client.backward(ctx.step, sent, activations=activations)
            return crossing.received(answer.tensor, hidden_states), None, None


def _through_lane(
    lane: Lane[Any], remote: RemoteTrunk, crossing: Crossing, hidden_states: torch.Tensor
) -> torch.Tensor:
    """The way through the trunk of one of several micro-batches: a leaf, whose gradient is brought back later."""
    exact, client = remote.mode == "exact", remote.client
    lane.check_not_given_up()
    step, future = crossing.submit_forward(client, crossing.sent(hidden_states.detach()), keep=exact)
    lane.wait(future, client.longest_wait_seconds)
    client.finish_forward(step, client.wait(future))
    output = crossing.received(step.output, hidden_states).requires_grad_()

    def submit(gradients: torch.Tensor) -> Future[Any]:
        crossing.check_gradients(gradients)
        if exact:
            return client.submit_backward(step, crossing.sent(gradients))
        passed: Future[Any] = Future()
        passed.set_result(gradients)
        return passed

    def finish(answer: Any) -> None:
        gradients = crossing.received(read_answer(answer, "gradients").tensor, hidden_states) if exact else answer
        hidden_states.backward(gradients)

    lane.deferred.append(Deferred(output, submit, finish))
    return output
