"""The messages: one closed schema a type.

Each class is the header of one message type. A header is checked once, when it is decoded: strict types, no
unknown key, a bound on every number. This module knows neither frames nor tensors' bytes.
"""

from __future__ import annotations

from enum import IntEnum
from math import prod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from zsl.errors import Retry
from zsl.text.printable import is_printable, printable

MAX_DIMS = 4
MAX_TENSORS = 16
MAX_TENSOR_BYTES = 4 << 30
MAX_TEXT_CHARS = 512
ID_BYTES = 16

# The closed dtype table: name on the wire -> bytes per element.
DTYPE_BYTES: dict[str, int] = {
    "f32": 4, "f16": 2, "bf16": 2,
    "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"f32", "f16", "bf16"})


def _refuse_controls(name: str) -> str:
    if not is_printable(name):
        raise ValueError("has characters that control a terminal")
    return name


WireDtypeName = Literal["f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool"]
FloatDtypeName = Literal["f32", "f16", "bf16"]
# `lengths`: the activations are one row of sequences of these lengths, one after the other.
Role = Literal["activations", "gradients", "attention_mask", "position_ids", "lengths"]

Count = Annotated[int, Field(ge=0, le=2**53)]
Dim = Annotated[int, Field(ge=0, le=2**31 - 1)]
LayerIndex = Annotated[int, Field(ge=0, le=2**16)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Milliseconds = Annotated[int, Field(ge=0, le=7 * 24 * 3600 * 1000)]
# A client obeys these: shorter pings would keep it spinning, a longer one or a longer pause would have it miss a daemon
# that has died.
PingMilliseconds = Annotated[int, Field(ge=10, le=60_000)]
RetryMilliseconds = Annotated[int, Field(ge=0, le=60_000)]
Id16 = Annotated[bytes, Field(min_length=ID_BYTES, max_length=ID_BYTES)]
# Both reach terminals and logs of the other end: a name is refused, a text for people escaped.
Name = Annotated[str, Field(max_length=200), AfterValidator(_refuse_controls)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS), AfterValidator(lambda text: printable(text)[:MAX_TEXT_CHARS])]


class MessageType(IntEnum):
    """The type byte of the preamble."""

    HELLO = 1
    WELCOME = 2
    FORWARD = 3
    BACKWARD = 4
    RESULT = 5
    ERROR = 6
    RELEASE = 7
    CANCEL = 8
    PING = 9
    PONG = 10
    GOAWAY = 11
    BYE = 12
    STATUS = 13


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TensorDescriptor(_Strict):
    """One tensor of a message; its bytes are the buffer at the same index, little-endian and contiguous."""

    role: Role
    dtype: WireDtypeName
    shape: tuple[Dim, ...] = Field(max_length=MAX_DIMS)
    nbytes: Count

    @field_validator("shape", mode="before")
    @classmethod
    def _a_list_is_a_shape(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # msgpack has arrays only

    @model_validator(mode="after")
    def _size_agrees(self) -> Self:
        expected = prod(self.shape) * DTYPE_BYTES[self.dtype]
        if expected != self.nbytes:
            raise ValueError(
                f"{self.role}: shape {self.shape} of {self.dtype} takes {expected} bytes, not {self.nbytes}"
            )
        return self


# The first descriptor that is wrong is enough to refuse a message.
Tensors = Annotated[list[TensorDescriptor], FailFast(), Field(min_length=1, max_length=MAX_TENSORS)]


class Header(_Strict):
    """Base of all headers. `TYPE` is the message's type byte."""

    TYPE: ClassVar[MessageType]


class ModelIdentity(_Strict):
    """Which model, exactly: its type and sizes to read, and two digests to compare.

    `config_digest` covers the configuration (what `save_pretrained` would write, without the names and
    versions), `weights_digest` every tensor of the checkpoint.
    """

    model_type: Name
    layers: LayerIndex
    hidden_size: Dim
    config_digest: Digest
    weights_digest: Digest


class Cut(_Strict):
    """The layers `[start, stop)` that the trunk holds."""

    start: LayerIndex
    stop: LayerIndex

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


class Limits(_Strict):
    """What the daemon takes from one session, stated before anything is sent."""

    max_message_bytes: Annotated[int, Field(ge=0, le=MAX_TENSOR_BYTES)]  # of one tensor
    max_header_bytes: Count
    max_request_tokens: Positive  # rows x tokens of one request
    max_row_tokens: Positive  # tokens of one row: the model's positions
    max_inflight_requests: Positive
    max_inflight_bytes: Count
    lease_ms: Milliseconds
    ping_ms: PingMilliseconds


class Hello(Header):
    """Open a session. A client without a model (`model=None`) takes the trunk as it is.

    `resume`: the session that was open before the connection was lost. If it still is, it goes on from here, with all
    that is kept for it; if not, a new one is opened.
    """

    TYPE = MessageType.HELLO
    request: Count
    software: Name
    dtype: FloatDtypeName  # of the activations that this client will send
    model: ModelIdentity | None
    cut: Cut | None  # None: the client takes the daemon's
    resume: Id16 | None


class Welcome(Header):
    """The session is open, or goes on. `epoch` names this life of the daemon."""

    TYPE = MessageType.WELCOME
    request: Count
    software: Name
    epoch: Id16
    session: Id16
    model: ModelIdentity
    cut: Cut
    dtype: FloatDtypeName  # that the trunk computes in
    forward_only: bool
    packs: bool  # takes sequences of several lengths in one row, with their `lengths` beside them
    deterministic: bool  # an answer does not depend on who else is served, bit for bit
    trunk_parameters: Count
    limits: Limits


class InSession(Header):
    """What messages within a session have in common, in both directions. The checksum covers it."""

    session: Id16
    epoch: Id16


class WorkHeader(InSession):
    """What FORWARD and BACKWARD have in common."""

    request: Count
    attempt: Annotated[int, Field(ge=0, le=255)]
    budget_ms: Milliseconds  # what is left of the request's time when it is sent
    tensors: Tensors


class Forward(WorkHeader):
    """Run the trunk on activations. `keep`: a BACKWARD for this request will follow."""

    TYPE = MessageType.FORWARD
    keep: bool


class Backward(WorkHeader):
    """The vector-Jacobian product of the trunk with the given gradients.

    `step` is the id of the FORWARD that it belongs to. A message that brings the activations (and mask and
    positions) along is complete in itself: the daemon needs to hold nothing.
    """

    TYPE = MessageType.BACKWARD
    step: Count


class Result(InSession):
    """The answer to FORWARD (activations) or BACKWARD (gradients). Every client numbers its own requests, so only
    session and request together say whose answer this is."""

    TYPE = MessageType.RESULT
    request: Count
    merged: Annotated[int, Field(ge=1, le=2**16)]  # requests that shared the pass
    queue_us: Count
    compute_us: Count
    tensors: Tensors


class Error(Header):
    """The answer to anything that failed. `request` is None when the message could not be read that far, `session` then
    and when the message named none."""

    TYPE = MessageType.ERROR
    request: Count | None
    session: Id16 | None
    epoch: Id16
    code: Name
    retry: Annotated[Retry, Field(strict=False)]
    retry_after_ms: RetryMilliseconds
    text: Text


class Release(InSession):
    """The client will not ask a backward for this step. Not answered."""

    TYPE = MessageType.RELEASE
    step: Count


class Cancel(InSession):
    """Take a queued request back. The request itself is answered (with CANCELLED if it had not started)."""

    TYPE = MessageType.CANCEL
    request: Count


class Ping(InSession):
    """Renew the lease and ask for a sign of life. It may come on another connection than the session's requests, so
    that it need not queue behind them."""

    TYPE = MessageType.PING
    request: Count


class Pong(InSession):
    """The daemon lives; `progress_age_ms` is the time since its compute thread last finished something or was idle.

    `inflight_requests`: those of the session that have no answer yet. Messages of one connection keep their order, so
    if the ping came on that of the requests and this is less than what its client still waits for, something was lost.
    """

    TYPE = MessageType.PONG
    request: Count
    progress_age_ms: Milliseconds
    inflight_requests: Count


class GoAway(InSession):
    """The daemon will go: no new forward is taken, steps that are open may end within `drain_ms`."""

    TYPE = MessageType.GOAWAY
    drain_ms: Milliseconds


class Bye(InSession):
    """The client ends its session. Not answered."""

    TYPE = MessageType.BYE


class StatusRequest(Header):
    """Ask what the daemon serves. Needs no session."""

    TYPE = MessageType.STATUS
    request: Count


class Status(Header):
    """What the daemon serves, and how busy it is: the answer to a STATUS request."""

    TYPE = MessageType.STATUS
    request: Count
    software: Name
    epoch: Id16
    model: ModelIdentity
    cut: Cut
    dtype: FloatDtypeName
    forward_only: bool
    trunk_parameters: Count
    sessions: Count
    queued_requests: Count
    held_bytes: Count


# What each end may receive. STATUS is the one type with a schema for each direction.
TO_DAEMON: dict[int, type[Header]] = {
    cls.TYPE: cls for cls in (Hello, Forward, Backward, Release, Cancel, Ping, Bye, StatusRequest)
}
TO_CLIENT: dict[int, type[Header]] = {cls.TYPE: cls for cls in (Welcome, Result, Error, Pong, GoAway, Status)}
