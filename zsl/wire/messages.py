"""Message schemas of the protocol: one pydantic model per header.

Each header is validated once, when it is decoded: strict types, no unknown keys, a bound on every number. Framing and
tensor bytes are in `zsl.wire.frames` and `zsl.wire.tensors`.
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
# Bits of the weights of linear layers, by bitsandbytes.
Quantization = Literal["4bit", "8bit"]
# `lengths`: the activations are one row of concatenated sequences of these lengths.
# `layout`, `weights`, `adapter_gradients`: flat, of an adapter in the trunk's layers (`zsl.wire.adapter_layout`).
# `cache_rows` [rows]: the row of the cache that each row of the activations goes on with.
# `hidden_states` [states, rows, tokens, hidden]: the inputs of the trunk's layers but the first. `router_logits`
# [routers, rows * tokens, experts]: of its layers with experts, in order.
Reveal = Literal["hidden_states", "router_logits"]
Role = Literal[
    "activations", "gradients", "attention_mask", "position_ids", "lengths", "cache_rows",
    "layout", "weights", "adapter_gradients",
    "hidden_states", "router_logits", "hidden_states_gradients", "router_logits_gradients",
    "weight_norms",
]  # fmt: skip
GRADIENTS_OF: dict[Reveal, Role] = {
    "hidden_states": "hidden_states_gradients",
    "router_logits": "router_logits_gradients",
}

Count = Annotated[int, Field(ge=0, le=2**53)]
Dim = Annotated[int, Field(ge=0, le=2**31 - 1)]
LayerIndex = Annotated[int, Field(ge=0, le=2**16)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Milliseconds = Annotated[int, Field(ge=0, le=7 * 24 * 3600 * 1000)]
# A client obeys these: a shorter ping interval would keep it busy, a longer interval or pause would let it miss a dead
# daemon.
PingMilliseconds = Annotated[int, Field(ge=10, le=60_000)]
RetryMilliseconds = Annotated[int, Field(ge=0, le=60_000)]
Id16 = Annotated[bytes, Field(min_length=ID_BYTES, max_length=ID_BYTES)]
# Both reach terminals and logs of the other end: control characters are refused in a name, escaped in a text.
Name = Annotated[str, Field(max_length=200), AfterValidator(_refuse_controls)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS), AfterValidator(lambda text: printable(text)[:MAX_TEXT_CHARS])]


class MessageType(IntEnum):
    """Type byte of the preamble."""

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
    ADAPTER = 14
    WEIGHT_NORMS = 15


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TensorDescriptor(_Strict):
    """Description of one tensor; its bytes are the buffer at the same index, little-endian and contiguous."""

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


Reveals = Annotated[list[Reveal], Field(max_length=len(GRADIENTS_OF))]
# Validation stops at the first invalid descriptor.
Tensors = Annotated[list[TensorDescriptor], FailFast(), Field(min_length=1, max_length=MAX_TENSORS)]


class Header(_Strict):
    """Base class of all headers. `TYPE` is the message's type byte."""

    TYPE: ClassVar[MessageType]


class ModelIdentity(_Strict):
    """Identity of a model: type and sizes to read, and two digests to compare.

    `config_digest` covers the configuration (as `save_pretrained` writes it, without names and versions),
    `weights_digest` every tensor of the base model: a head belongs to the client.
    """

    model_type: Name
    layers: LayerIndex
    hidden_size: Dim
    config_digest: Digest
    weights_digest: Digest


class Cut(_Strict):
    """Layers `[start, stop)` that the trunk holds."""

    start: LayerIndex
    stop: LayerIndex

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


class Limits(_Strict):
    """Limits of the daemon for one session, sent in the WELCOME."""

    max_message_bytes: Annotated[int, Field(ge=0, le=MAX_TENSOR_BYTES)]  # of one tensor
    max_header_bytes: Count
    max_request_tokens: Positive  # rows x tokens of one request
    max_row_tokens: Positive  # tokens of one row: the model's positions
    max_inflight_requests: Positive
    max_inflight_bytes: Count
    lease_ms: Milliseconds
    ping_ms: PingMilliseconds


class AdapterLimits(_Strict):
    """Limits of the adapters in the trunk's layers: rank of each module, bytes of a version's weights."""

    max_rank: Positive
    max_bytes: Annotated[int, Field(ge=1, le=MAX_TENSOR_BYTES)]


class Hello(Header):
    """Open a session. A client without a model (`model=None`) accepts any trunk.

    `resume`: id of the session before the connection was lost. If its lease still runs, it is resumed, with all that is
    kept for it; if not, a new one is opened.
    """

    TYPE = MessageType.HELLO
    request: Count
    software: Name
    dtype: FloatDtypeName  # of the activations that this client will send
    model: ModelIdentity | None
    cut: Cut | None  # None: accept the daemon's
    resume: Id16 | None


class Welcome(Header):
    """Answer to HELLO: the session is open, or resumed. `epoch` identifies this daemon process."""

    TYPE = MessageType.WELCOME
    request: Count
    software: Name
    epoch: Id16
    session: Id16
    model: ModelIdentity
    cut: Cut
    dtype: FloatDtypeName  # of the trunk's computation
    quantization: Quantization | None  # of the trunk's linear layers
    forward_only: bool
    packs: bool  # accepts sequences of several lengths in one row, with their `lengths`
    deterministic: bool  # an answer has the same bits whatever other clients send
    trunk_parameters: Count
    adapters: AdapterLimits | None  # None: the daemon accepts no adapters
    reveals: Reveals  # what a FORWARD may ask for from inside the trunk
    caches: bool  # keeps keys and values between forwards
    limits: Limits
    connection: Id16 | None  # its digest at the daemon's end (`zsl.transport.connection_digest`)


class InSession(Header):
    """Base class of headers within a session, in both directions."""

    session: Id16
    epoch: Id16


class Adapter(InSession):
    """A piece of an adapter version: the bytes from `offset` of its flat weights, of `nbytes` in all.

    The first piece brings the layout too. Pieces come in order, before the first request that names the version, on
    the same connection. Not answered; an error names `request`, the request that they precede.
    """

    TYPE = MessageType.ADAPTER
    request: Count
    version: Id16  # digest of layout, dtype and weights (`zsl.wire.adapter_layout.version_of`)
    dtype: FloatDtypeName  # of the weights, and of their gradients, on the wire
    offset: Count
    nbytes: Positive
    tensors: Tensors  # weights [bytes], u8; in the first piece also layout [bytes], u8


class WeightNorms(InSession):
    """Ask for the Euclidean norms of the rows `[out]` of the weight of a linear module in the trunk.

    `path`: as in `zsl.wire.adapter_layout`. Answered at once, with a RESULT: weight_norms [out], f32.
    """

    TYPE = MessageType.WEIGHT_NORMS
    request: Count
    path: Name


class UsedAdapter(_Strict):
    """The adapter version that a request runs with. `dropout_seed`: seed of its dropout masks, None for no dropout."""

    version: Id16
    dropout_seed: Count | None


class AdapterSum(_Strict):
    """Sum of the adapter's gradients over several backwards with one version, kept by the daemon.

    `name` is the client's. `position`: the number of backwards that have been added before. A cache: a backward whose
    predecessors are not in the sum is answered with UNKNOWN_SUM, and the client starts a new sum.
    """

    name: Count
    position: Annotated[int, Field(ge=0, le=2**20)]


class UsedCache(_Strict):
    """Keys and values of the trunk's layers that a FORWARD continues, or makes.

    `name`: id of the FORWARD that made them. `version`: number of forwards that they have had, 0 to make new ones. The
    request runs behind the first `length` tokens of its `cache_rows` (without them: of all rows, in order).
    A cache: a FORWARD whose version is not the newest is answered with UNKNOWN_CACHE.
    """

    name: Count
    version: Count
    length: Dim


class WorkHeader(InSession):
    """Base class of FORWARD and BACKWARD. A BACKWARD names the same adapter as its FORWARD."""

    request: Count
    attempt: Annotated[int, Field(ge=0, le=255)]
    budget_ms: Milliseconds  # time left until the request's deadline, when sent
    adapter: UsedAdapter | None
    tensors: Tensors


class Forward(WorkHeader):
    """Run the trunk on activations. `keep`: a BACKWARD for this request will follow.

    `reveal`: answer with these tensors from inside the trunk too. `cache`: keys and values of the tokens before these;
    the attention mask is of all tokens then.
    """

    TYPE = MessageType.FORWARD
    keep: bool
    reveal: Reveals
    cache: UsedCache | None


class Backward(WorkHeader):
    """Compute the vector-Jacobian product of the trunk with the given gradients.

    `step` is the request id of its FORWARD. A message that includes the activations (and mask and positions) is
    complete in itself: the daemon needs nothing stored. It may have gradients of revealed tensors, which are added.
    """

    TYPE = MessageType.BACKWARD
    step: Count
    adapter_sum: AdapterSum | None  # add the gradients of the adapter's weights to this sum
    adapter_gradients: bool  # answer with those of the adapter's weights too: with the sum, if one is named


class Result(InSession):
    """Answer to FORWARD (activations, and what it asked to reveal), BACKWARD (gradients; adapter_gradients, flat) or
    WEIGHT_NORMS.

    Every client numbers its own requests, so only session and request together identify the request.
    """

    TYPE = MessageType.RESULT
    request: Count
    merged: Annotated[int, Field(ge=1, le=2**16)]  # requests that shared the pass
    queue_us: Count
    compute_us: Count
    tensors: Tensors


class Error(Header):
    """Answer to a failed message. `request` is None if it could not be read, `session` also if the message named
    none."""

    TYPE = MessageType.ERROR
    request: Count | None
    session: Id16 | None
    epoch: Id16
    code: Name
    retry: Annotated[Retry, Field(strict=False)]
    retry_after_ms: RetryMilliseconds
    text: Text


class Release(InSession):
    """Tell the daemon that no backward will follow for this step, and no forward for the cache of its name. Not
    answered."""

    TYPE = MessageType.RELEASE
    step: Count


class Cancel(InSession):
    """Cancel a queued request. The request itself is answered (with CANCELLED if it had not started)."""

    TYPE = MessageType.CANCEL
    request: Count


class Ping(InSession):
    """Renew the lease and ask for a PONG. May be sent on another connection than the session's requests, so that it
    does not queue behind them."""

    TYPE = MessageType.PING
    request: Count


class Pong(InSession):
    """Answer to PING. `progress_age_ms`: time since the compute thread last finished a job or was idle.

    `inflight_requests`: number of the session's unanswered requests. A connection keeps the order of its messages, so
    if the ping came on that of the requests and its client waits for more answers than this, a message was lost.
    """

    TYPE = MessageType.PONG
    request: Count
    progress_age_ms: Milliseconds
    inflight_requests: Count


class GoAway(InSession):
    """Announce a shutdown: no new forward is accepted, open steps may end within `drain_ms`."""

    TYPE = MessageType.GOAWAY
    drain_ms: Milliseconds


class Bye(InSession):
    """End the session. Not answered."""

    TYPE = MessageType.BYE


class StatusRequest(Header):
    """Ask for the daemon's `Status`. Needs no session."""

    TYPE = MessageType.STATUS
    request: Count


class Status(Header):
    """Answer to STATUS: the served model, and the daemon's load."""

    TYPE = MessageType.STATUS
    request: Count
    software: Name
    epoch: Id16
    model: ModelIdentity
    cut: Cut
    dtype: FloatDtypeName
    quantization: Quantization | None
    forward_only: bool
    trunk_parameters: Count
    sessions: Count
    queued_requests: Count
    held_bytes: Count  # of steps, for pending backwards
    adapter_bytes: Count
    cache_bytes: Count  # of keys and values of generations


# Messages that each end may receive. STATUS is the one type with a schema for each direction.
TO_DAEMON: dict[int, type[Header]] = {
    cls.TYPE: cls for cls in (Hello, Adapter, WeightNorms, Forward, Backward, Release, Cancel, Ping, Bye, StatusRequest)
}
TO_CLIENT: dict[int, type[Header]] = {cls.TYPE: cls for cls in (Welcome, Result, Error, Pong, GoAway, Status)}
