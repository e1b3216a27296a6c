"""`TrunkClient`: forward and backward of a remote trunk as calls on torch tensors.

with TrunkClient("tcp://127.0.0.1:5555") as trunk:
    step = trunk.forward(activations, keep=True)
    gradients_in = trunk.backward(step, gradients_out)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self

import torch

from zsl.client.replayable_step import Answer, CallAdapter, HeldCache, Step, read_answer
from zsl.errors import InternalError, ModelError
from zsl.link.adapter_versions import NO_ADAPTERS, EncodedAdapter
from zsl.link.connection import Connection
from zsl.link.keys import read_client_keys
from zsl.link.traffic import Traffic
from zsl.link.unanswered_requests import Build, Pending
from zsl.wire.frames import Frame, Message
from zsl.wire.messages import (
    GRADIENTS_OF,
    AdapterSum,
    Backward,
    Cut,
    FloatDtypeName,
    Forward,
    Header,
    ModelIdentity,
    Reveal,
    Status,
    WeightNorms,
    Welcome,
)
from zsl.wire.tensors import encode_tensors

CONNECT_TIMEOUT_SECONDS = 10.0
REQUEST_TIMEOUT_SECONDS = 300.0


class TrunkClient:
    """Client of a trunk daemon. Thread-safe; calls may overlap.

    `endpoint`: `HOST:PORT`, or several separated by commas, of daemons that serve the same trunk: if one is lost, the
    next is used. `server_key` (the daemon's `.key` file or the key itself) and `client_key` (the own `.key_secret`
    file): for daemons that encrypt. `model`, `cut`: refuse a daemon that serves another. `dtype`: dtype of the
    activations to send.

    A context manager, which connects and closes.

    Tensors are sent without a copy: do not modify them before the call (or its future) is done.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | None = None,
        client_key: str | Path | None = None,
        model: ModelIdentity | None = None,
        cut: Cut | None = None,
        dtype: FloatDtypeName = "f32",
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        self._connection = Connection(
            endpoint,
            keys=read_client_keys(server_key, client_key),
            connect_timeout_seconds=connect_timeout_seconds,
            request_timeout_seconds=request_timeout_seconds,
        )
        self._wanted = (model, cut, dtype)
        weakref.finalize(self, self._connection.close)

    @property
    def endpoint(self) -> str:
        return self._connection.endpoint

    @property
    def welcome(self) -> Welcome:
        """WELCOME of the session: model, cut, limits. Raises `ClosedError` before `connect`."""
        return self._connection.welcome

    @property
    def replays(self) -> int:
        """Number of requests sent again because a connection or a daemon was lost."""
        return self.traffic.replays

    @property
    def traffic(self) -> Traffic:
        """Bytes, answers, and the daemon's seconds so far."""
        return self._connection.traffic

    def connect(self) -> Welcome:
        """Open a session, unless one is open.

        Raises `TrunkUnreachable`, `TrunkAuthError`, `WrongModelError` or another `WireError`.
        """
        return self._connection.open(*self._wanted)

    def forward(
        self,
        activations: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        keep: bool = False,
        adapter: CallAdapter | None = None,
        reveal: Sequence[Reveal] = (),
        cache: HeldCache | None = None,
        rows: list[int] | None = None,
    ) -> Step:
        """Run the trunk on activations `[rows, tokens, hidden]`; `keep` if a backward will follow.

        Optional: a mask `[rows, tokens]`, positions `[rows or 1, tokens]`; for one row of several concatenated
        sequences their lengths `[sequences]` (if `welcome.packs`); an adapter in the trunk's layers (if
        `welcome.adapters`). `reveal`: tensors from inside the trunk to return too, in `Step.answer` (those of
        `welcome.reveals`). `cache`: run behind its tokens, of these `rows` (None: of all, in order), and add to it (if
        `welcome.caches`); the mask is of all tokens then.

        Raises `ZslError`: the request was refused, timed out, or the connection was lost for good.
        """
        beside = attention_mask, position_ids, lengths
        step, build, nbytes = self._forward(activations, *beside, keep, adapter, reveal, cache, rows)
        message = self._connection.call(step.request, build, nbytes=nbytes, adapter=_version(adapter))
        self.finish_forward(step, message, cache)
        return step

    def new_cache(self) -> HeldCache:
        """Return an empty cache for `forward`."""
        return HeldCache(self._connection)

    def has(self, cache: HeldCache) -> bool:
        """Return whether a cache is on this connection."""
        return cache.connection is self._connection

    def backward(
        self,
        step: Step,
        gradients: torch.Tensor,
        *,
        activations: torch.Tensor | None = None,
        adapter_gradients: bool = False,
        adapter_sum: AdapterSum | None = None,
        at_revealed: Mapping[Reveal, torch.Tensor] | None = None,
    ) -> Answer:
        """Return the gradient at the trunk's input for the gradient `[rows, tokens, hidden]` at its output.

        `activations`: those of the forward, needed after `Step.forget_tensors`. `adapter_gradients`: return those of
        the forward's adapter too. `adapter_sum`: add them to this sum at the daemon, and return that. `at_revealed`:
        gradients at tensors that the forward revealed.
        """
        built = self._backward(step, gradients, activations, adapter_gradients, adapter_sum, at_revealed)
        request, build, nbytes = built
        message = self._connection.call(request, build, nbytes=nbytes, adapter=_version(step.adapter))
        step.held_in_session = None
        return read_answer(message, "gradients", adapter_gradients=adapter_gradients)

    def status(self) -> Status:
        """Return the model that the daemon serves, and its load."""
        header = self._connection.wait(self._connection.submit_status()).header
        if not isinstance(header, Status):
            raise InternalError(f"{self.endpoint} answered STATUS with {type(header).__name__}")
        return header

    def weight_norms(self, paths: Sequence[str]) -> list[torch.Tensor]:
        """Return the norms `[out]` of the rows of the weights of linear modules in the trunk, in single precision.

        `paths`: each the index of a layer and the path within it, `7.mlp.up_proj`. Raises `ModelError` if the daemon
        accepts no adapters.
        """
        if self.welcome.adapters is None:
            raise ModelError(NO_ADAPTERS)
        futures = [self._submit_weight_norms(path) for path in paths]
        return [read_answer(self._connection.wait(future), "weight_norms").tensor for future in futures]

    def _submit_weight_norms(self, path: str) -> Future[Message]:
        request = self._connection.new_request_id()

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            return WeightNorms(session=welcome.session, epoch=welcome.epoch, request=request, path=path), ()

        return self._connection.submit(request, build)

    def submit_forward(
        self,
        activations: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        keep: bool = False,
        adapter: CallAdapter | None = None,
        reveal: Sequence[Reveal] = (),
        cache: HeldCache | None = None,
        rows: list[int] | None = None,
    ) -> tuple[Step, Future[Message]]:
        """Send a forward without waiting. Return the step, and the future of the message for `finish_forward`."""
        beside = attention_mask, position_ids, lengths
        step, build, nbytes = self._forward(activations, *beside, keep, adapter, reveal, cache, rows)
        return step, self._connection.submit(step.request, build, nbytes=nbytes, adapter=_version(adapter))

    def _forward(
        self,
        activations: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        lengths: torch.Tensor | None,
        keep: bool,
        adapter: CallAdapter | None,
        reveal: Sequence[Reveal],
        cache: HeldCache | None,
        rows: list[int] | None,
    ) -> tuple[Step, Build, int]:
        """Return a step, the builder of its FORWARD message, and the bytes of its tensors."""
        if keep and activations.is_inference():
            activations = activations.clone()  # it has no version counter to detect in-place changes
        step = Step(self._connection, activations, attention_mask, position_ids, lengths, adapter, reveal)
        request = step.request
        cache_rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
        encoded = encode_tensors({**step.inputs(), "cache_rows": cache_rows})

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            step.held_in_session = welcome.session if keep else None
            descriptors, buffers = encoded
            header = Forward(
                session=welcome.session,
                epoch=welcome.epoch,
                request=request,
                attempt=pending.attempt,
                budget_ms=pending.budget_ms(),
                adapter=None if adapter is None else adapter.header,
                keep=keep,
                reveal=list(step.reveal),
                cache=None if cache is None else cache.sent(request, welcome.session),
                tensors=descriptors,
            )
            return header, buffers

        return step, build, sum(len(buffer) for buffer in encoded[1])

    @property
    def longest_wait_seconds(self) -> float:
        """Upper bound of the time until a future of `submit_forward` or `submit_backward` is done."""
        return self._connection.longest_wait_seconds

    def wait(self, future: Future[Message]) -> Message:
        """Return the message of a submitted request's future. Raises `ZslError`."""
        return self._connection.wait(future)

    def finish_forward(self, step: Step, message: Message, cache: HeldCache | None = None) -> None:
        """Set the answer of a step's forward, behind a `cache` if it has one. Raises `InternalError` for an unexpected
        message."""
        step.answer = read_answer(message, "activations", reveal=step.reveal)
        if cache is not None:
            cache.answered(step.answer.tensor.shape[1])

    def submit_backward(
        self,
        step: Step,
        gradients: torch.Tensor,
        *,
        activations: torch.Tensor | None = None,
        adapter_gradients: bool = False,
        adapter_sum: AdapterSum | None = None,
        at_revealed: Mapping[Reveal, torch.Tensor] | None = None,
    ) -> Future[Message]:
        """Send a backward without waiting. The message's tensors are the gradient, and that of the adapter if asked."""
        built = self._backward(step, gradients, activations, adapter_gradients, adapter_sum, at_revealed)
        request, build, nbytes = built
        future = self._connection.submit(request, build, nbytes=nbytes, adapter=_version(step.adapter))
        future.add_done_callback(step.went_back)
        return future

    def _backward(
        self,
        step: Step,
        gradients: torch.Tensor,
        activations: torch.Tensor | None,
        adapter_gradients: bool,
        adapter_sum: AdapterSum | None,
        at_revealed: Mapping[Reveal, torch.Tensor] | None,
    ) -> tuple[int, Build, int]:
        """Return the request id of a step's backward, the builder of its message, and the bytes of its gradients."""
        request = self._connection.new_request_id()
        # Encoded in the caller's thread, so that a copy from a GPU follows the computation of the gradients.
        inputs = encode_tensors(step.inputs(activations))
        of_revealed = {GRADIENTS_OF[name]: gradient for name, gradient in (at_revealed or {}).items()}
        encoded = encode_tensors({"gradients": gradients, **of_revealed})

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            held = step.held_in_session == welcome.session and not pending.complete
            sent = [encoded] if held else [inputs, encoded]
            header = Backward(
                session=welcome.session,
                epoch=welcome.epoch,
                request=request,
                attempt=pending.attempt,
                budget_ms=pending.budget_ms(),
                adapter=None if step.adapter is None else step.adapter.header,
                step=step.request,
                adapter_sum=adapter_sum,
                adapter_gradients=adapter_gradients,
                tensors=[descriptor for descriptors, _ in sent for descriptor in descriptors],
            )
            return header, [buffer for _, buffers in sent for buffer in buffers]

        return request, build, sum(len(buffer) for buffer in encoded[1])

    def close(self) -> None:
        """End the session. Waiting calls fail with `ClosedError`."""
        self._connection.close()

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint!r})"


def _version(adapter: CallAdapter | None) -> EncodedAdapter | None:
    return None if adapter is None else adapter.version
