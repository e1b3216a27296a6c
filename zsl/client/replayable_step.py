"""A forward sent to the trunk: the inputs that its backward may have to send again, unless autograd keeps them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from zsl.errors import ChangedError, InternalError
from zsl.link.adapter_versions import EncodedAdapter
from zsl.link.connection import Connection
from zsl.wire.frames import Message
from zsl.wire.messages import Result, Reveal, Role, UsedAdapter, UsedCache
from zsl.wire.tensors import decode_tensor


@dataclass(frozen=True, slots=True)
class Answer:
    """Tensor of a RESULT, number of requests in its pass, and the daemon's times.

    `adapter_gradients`: of a backward that asked for them, flat, in the dtype of the version. `revealed`: tensors from
    inside the trunk that a forward asked for.
    """

    tensor: torch.Tensor
    merged: int
    queue_seconds: float
    compute_seconds: float
    adapter_gradients: torch.Tensor | None = None
    revealed: dict[Reveal, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CallAdapter:
    """Adapter of one forward and its backward. `dropout_seed`: seed of its dropout masks, None for no dropout."""

    version: EncodedAdapter
    dropout_seed: int | None = None

    @property
    def header(self) -> UsedAdapter:
        return UsedAdapter(version=self.version.digest, dropout_seed=self.dropout_seed)


class Step:
    """Forward, with the tensors for its backward. `output` is `[rows, tokens, hidden]` on the CPU.

    The daemon stores a step that was sent with `keep` until its backward. A step that is garbage-collected without an
    answered backward releases it.
    """

    def __init__(
        self,
        connection: Connection,
        activations: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        lengths: torch.Tensor | None,
        adapter: CallAdapter | None = None,
        reveal: Sequence[Reveal] = (),
    ) -> None:
        self.request = connection.new_request_id()
        self.held_in_session: bytes | None = None  # session in which the daemon may hold the step
        self.answer: Answer | None = None
        self.adapter = adapter
        self.reveal = tuple(reveal)
        self._connection = connection
        self._activations: torch.Tensor | None = activations
        self._version = _version(activations)
        # Small copies, so that a mask modified after the forward does not change the backward.
        self._attention_mask = None if attention_mask is None else attention_mask.clone()
        self._position_ids = None if position_ids is None else position_ids.clone()
        self._lengths = lengths

    @property
    def output(self) -> torch.Tensor:
        assert self.answer is not None, "the forward has not been answered"
        return self.answer.tensor

    def inputs(self, activations: torch.Tensor | None = None) -> dict[Role, torch.Tensor | None]:
        """Return the tensors of the forward; `activations` replace forgotten ones.

        Raises `ChangedError` if the activations were modified in place since.
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
        """Note that the daemon dropped the step, if its backward was neither cancelled nor failed."""
        if not backward.cancelled() and backward.exception() is None:
            self.held_in_session = None

    def forget_tensors(self) -> None:
        """Drop activations and output; the caller must pass the activations to `backward`."""
        self._activations = self.answer = None

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Bound here, because at interpreter shutdown `sys` may be gone, and no release is needed.
        if self.held_in_session is not None and not finalizing():
            self._connection.release(self.request, self.held_in_session)


class HeldCache:
    """Keys and values of the first `length` tokens of a text, which the daemon may hold. Garbage-collected, it releases
    them."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.length = 0
        self._version = 0  # forwards that they have had
        self._name = 0  # the id of the first of them
        self._session: bytes | None = None  # in which the last of them was sent

    def sent(self, request: int, session: bytes) -> UsedCache:
        """Note a forward behind its tokens, and return what its header says of them."""
        if not self._version:
            self._name = request
        self._session = session
        return UsedCache(name=self._name, version=self._version, length=self.length)

    def answered(self, tokens: int) -> None:
        """Note that the forward that was sent has added tokens."""
        self._version += 1
        self.length += tokens

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._session is not None and not finalizing():
            self.connection.release(self._name, self._session)


def _version(tensor: torch.Tensor) -> int | None:
    """Return a tensor's version counter; None for an inference tensor, which has none."""
    return None if tensor.is_inference() else tensor._version


def read_answer(
    message: Message, role: Role, *, adapter_gradients: bool = False, reveal: Sequence[Reveal] = ()
) -> Answer:
    """Return the answer in a RESULT. Its tensors may share the message's memory. Raises `InternalError`."""
    header = message.header
    due: list[Role] = [role, "adapter_gradients"] if adapter_gradients else [role, *sorted(reveal)]
    if not isinstance(header, Result) or [descriptor.role for descriptor in header.tensors] != due:
        raise InternalError(
            f"the trunk answered with {type(header).__name__} where a RESULT with {' and '.join(due)} is due"
        )
    tensors = [decode_tensor(*pair) for pair in zip(header.tensors, message.buffers, strict=True)]
    return Answer(
        tensor=tensors[0],
        merged=header.merged,
        queue_seconds=header.queue_us / 1e6,
        compute_seconds=header.compute_us / 1e6,
        adapter_gradients=tensors[1] if adapter_gradients else None,
        revealed=dict(zip(sorted(reveal), tensors[1:], strict=False)),
    )
