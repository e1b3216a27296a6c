"""`TrunkClient`: forward and backward of a remote trunk, as calls on torch tensors.

with TrunkClient("tcp://127.0.0.1:5555") as trunk:
    step = trunk.forward(activations, keep=True)
    gradients_in = trunk.backward(step, gradients_out)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from zsl.errors import ChangedError, InternalError
from zsl.link.connection import Connection
from zsl.link.keys import read_client_keys
from zsl.link.pending import Build, Pending
from zsl.link.traffic import Traffic
from zsl.wire.frames import Frame, Message
from zsl.wire.messages import (
    Backward,
    Cut,
    FloatDtypeName,
    Forward,
    Header,
    ModelIdentity,
    Result,
    Role,
    Status,
    Welcome,
)
from zsl.wire.tensors import decode_tensor, encode_tensors

CONNECT_TIMEOUT_SECONDS = 10.0
REQUEST_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a RESULT brought: the tensor, and how the daemon came to it."""

    tensor: torch.Tensor
    merged: int
    queue_seconds: float
    compute_seconds: float


class Step:
    """A forward, with what its backward needs. `output` is `[rows, tokens, hidden]` on the CPU.

    The daemon keeps something for a step that was sent with `keep` until its backward; a step that is dropped
    without one that was answered tells it so.
    """

    def __init__(
        self,
        connection: Connection,
        activations: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        lengths: torch.Tensor | None,
    ) -> None:
        self.request = connection.new_request_id()
        self.held_in_session: bytes | None = None  # where the daemon may hold it
        self.answer: Answer | None = None
        self._connection = connection
        self._activations: torch.Tensor | None = activations
        self._version = _version(activations)
        # Copies: they are small, and a mask that is written after the forward must not change the backward.
        self._attention_mask = None if attention_mask is None else attention_mask.clone()
        self._position_ids = None if position_ids is None else position_ids.clone()
        self._lengths = lengths

    @property
    def output(self) -> torch.Tensor:
        assert self.answer is not None, "the forward has not been answered"
        return self.answer.tensor

    def inputs(self, activations: torch.Tensor | None = None) -> dict[Role, torch.Tensor | None]:
        """The tensors of the forward; `activations` stand in for forgotten ones.

        Raises `ChangedError` if the activations were written since.
        """
        kept = self._activations
        if activations is None and kept is not None and _version(kept) != self._version:
            raise ChangedError("the activations of this step were written in place since its forward")
        return {
            "activations": kept if activations is None else activations,
            "attention_mask": self._attention_mask,
            "position_ids": self._position_ids,
            "lengths": self._lengths,
        }

    def went_back(self, backward: Future[Message]) -> None:
        """The daemon lets go of a step with its backward; not with one that was cancelled or failed."""
        if not backward.cancelled() and backward.exception() is None:
            self.held_in_session = None

    def forget_tensors(self) -> None:
        """Let go of activations and output; the caller keeps the activations for `backward`."""
        self._activations = self.answer = None

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Bound here, because at the interpreter's end `sys` may be gone, and there is nothing to tell any more.
        if self.held_in_session is not None and not finalizing():
            self._connection.release(self.request, self.held_in_session)


class TrunkClient:
    """A trunk daemon as seen by one client. Calls may come from any thread and may overlap.

    `endpoint`: `HOST:PORT`, or several with commas between them, of daemons that serve the same trunk: when one is
    gone, the next is taken. `server_key` (the daemon's `.key` file or the key itself) and `client_key` (one's own
    `.key_secret` file): for daemons that encrypt. `model`, `cut`: refuse a daemon that serves another. `dtype`: of the
    activations to be sent.

    A context manager, which connects and closes.

    Tensors that are passed in are sent without a copy: do not write them before the call (or its future) is done.
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
        """What the daemon said of itself; after `connect`."""
        return self._connection.welcome

    @property
    def replays(self) -> int:
        """How many requests had to be sent again so far, because a connection or a daemon was lost."""
        return self._connection.replays

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
    ) -> Step:
        """Run the trunk on activations `[rows, tokens, hidden]`; `keep` if a backward will follow.

        Optional: a mask `[rows, tokens]`, positions `[rows or 1, tokens]`; for one row that is several sequences,
        one after the other, their lengths `[sequences]` (if the WELCOME says that the trunk `packs`).

        Raises `ZslError`: the request was refused, timed out, or the connection was lost for good.
        """
        step, build, nbytes = self._forward(activations, attention_mask, position_ids, lengths, keep)
        self.finish_forward(step, self._connection.call(step.request, build, nbytes=nbytes))
        return step

    def backward(self, step: Step, gradients: torch.Tensor, *, activations: torch.Tensor | None = None) -> Answer:
        """The gradient at the trunk's input, for the gradient `[rows, tokens, hidden]` at its output.

        `activations`: those of the forward, if the step was made to forget them.
        """
        request, build = self._backward(step, gradients, activations)
        message = self._connection.call(request, build, nbytes=gradients.nbytes)
        step.held_in_session = None
        return read_answer(message, "gradients")

    def status(self) -> Status:
        """What the daemon serves, and how busy it is."""
        header = self._connection.wait(self._connection.submit_status()).header
        if not isinstance(header, Status):
            raise InternalError(f"{self.endpoint} answered STATUS with {type(header).__name__}")
        return header

    def submit_forward(
        self,
        activations: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Step, Future[Message]]:
        """`forward` without the wait: the step, and the future whose message `finish_forward` takes."""
        step, build, nbytes = self._forward(activations, attention_mask, position_ids, lengths, keep)
        return step, self._connection.submit(step.request, build, nbytes=nbytes)

    def _forward(
        self,
        activations: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        lengths: torch.Tensor | None,
        keep: bool,
    ) -> tuple[Step, Build, int]:
        """A step, what makes its FORWARD, and the bytes of that."""
        if keep and activations.is_inference():
            activations = activations.clone()  # it has no version that would show a write
        step = Step(self._connection, activations, attention_mask, position_ids, lengths)
        request = step.request
        encoded = encode_tensors(step.inputs())

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            step.held_in_session = welcome.session if keep else None
            descriptors, buffers = encoded
            header = Forward(
                session=welcome.session,
                epoch=welcome.epoch,
                request=request,
                attempt=pending.attempt,
                budget_ms=pending.budget_ms(),
                keep=keep,
                tensors=descriptors,
            )
            return header, buffers

        return step, build, sum(len(buffer) for buffer in encoded[1])

    @property
    def longest_wait_seconds(self) -> float:
        """After which a future of `submit_forward` or `submit_backward` is done, whatever happened."""
        return self._connection.longest_wait_seconds

    def wait(self, future: Future[Message]) -> Message:
        """The message that a submitted request's future brings. Raises `ZslError`."""
        return self._connection.wait(future)

    def finish_forward(self, step: Step, message: Message) -> None:
        """Give a step the answer to its forward. Raises `InternalError` for one that does not fit."""
        step.answer = read_answer(message, "activations")

    def submit_backward(
        self, step: Step, gradients: torch.Tensor, *, activations: torch.Tensor | None = None
    ) -> Future[Message]:
        """`backward` without the wait. The message's tensor is the gradient."""
        request, build = self._backward(step, gradients, activations)
        future = self._connection.submit(request, build, nbytes=gradients.nbytes)
        future.add_done_callback(step.went_back)
        return future

    def _backward(self, step: Step, gradients: torch.Tensor, activations: torch.Tensor | None) -> tuple[int, Build]:
        """The id of a step's backward, and what makes its BACKWARD."""
        request = self._connection.new_request_id()
        # Encoded here, in the caller's thread: on a GPU the copy must follow what computes the gradients.
        inputs, encoded = encode_tensors(step.inputs(activations)), encode_tensors({"gradients": gradients})

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            held = step.held_in_session == welcome.session and not pending.complete
            sent = [encoded] if held else [inputs, encoded]
            header = Backward(
                session=welcome.session,
                epoch=welcome.epoch,
                request=request,
                attempt=pending.attempt,
                budget_ms=pending.budget_ms(),
                step=step.request,
                tensors=[descriptor for descriptors, _ in sent for descriptor in descriptors],
            )
            return header, [buffer for _, buffers in sent for buffer in buffers]

        return request, build

    def close(self) -> None:
        """End the session. Calls that wait end with `ClosedError`."""
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


def _version(tensor: torch.Tensor) -> int | None:
    """The count of writes to a tensor; None for one made under `torch.inference_mode()`, which has none."""
    return None if tensor.is_inference() else tensor._version


def read_answer(message: Message, role: Role) -> Answer:
    """The tensor of a RESULT. It may share the memory of the received message. Raises `InternalError`."""
    header = message.header
    if not isinstance(header, Result) or [descriptor.role for descriptor in header.tensors] != [role]:
        raise InternalError(f"the trunk answered with {type(header).__name__} where a RESULT with {role} is due")
    return Answer(
        tensor=decode_tensor(header.tensors[0], message.buffers[0]),
        merged=header.merged,
        queue_seconds=header.queue_us / 1e6,
        compute_seconds=header.compute_us / 1e6,
    )
