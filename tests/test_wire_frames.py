"""Frames: what is sent comes back the same, and nothing that comes in does more than raise a WireError."""

from __future__ import annotations

import itertools
import random
import sys
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from support.mutations import mutated
from zsl.errors import CorruptError, MalformedError, ProtocolVersionError, Retry, TooLargeError, WireError
from zsl.text.printable import is_printable, printable
from zsl.wire.frames import (
    KIND,
    MAGIC,
    MAJOR,
    MAX_HEADER_BYTES,
    MAX_ITEMS,
    MAX_KEYS,
    UNCHECKED_BUFFERS,
    Frame,
    decode,
    encode,
    seal,
    seal_again,
)
from zsl.wire.messages import (
    DTYPE_BYTES,
    MAX_DIMS,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    MAX_TEXT_CHARS,
    TO_CLIENT,
    TO_DAEMON,
    Adapter,
    AdapterLimits,
    AdapterSum,
    Backward,
    Bye,
    Cancel,
    Cut,
    Error,
    Forward,
    GoAway,
    Header,
    Hello,
    Limits,
    MessageType,
    ModelIdentity,
    Ping,
    Pong,
    Release,
    Result,
    Status,
    StatusRequest,
    TensorDescriptor,
    UsedAdapter,
    UsedCache,
    WeightNorms,
    Welcome,
)

SESSION, EPOCH = b"s" * 16, b"e" * 16
IDENTITY = ModelIdentity(model_type="gpt2", layers=12, hidden_size=4, config_digest="0" * 64, weights_digest="a" * 64)
LIMITS = Limits(
    max_message_bytes=1,
    max_header_bytes=1,
    max_request_tokens=1,
    max_row_tokens=1,
    max_inflight_requests=1,
    max_inflight_bytes=1,
    lease_ms=1,
    ping_ms=10,
)
CUT = Cut(start=2, stop=10)
ACTIVATIONS = TensorDescriptor(role="activations", dtype="f32", shape=(1, 2, 4), nbytes=32)

VERSION = b"v" * 16
WORK: dict[str, Any] = {"session": SESSION, "epoch": EPOCH, "request": 1, "attempt": 0, "budget_ms": 9}
WORK["tensors"] = [ACTIVATIONS]

HEADERS: list[Header] = [
    Hello(request=1, software="0", dtype="f32", model=IDENTITY, cut=None, resume=None),
    Forward(**WORK, keep=True, reveal=[], cache=None, adapter=None),
    Forward(
        **WORK,
        keep=True,
        reveal=["hidden_states", "router_logits"],
        adapter=UsedAdapter(version=VERSION, dropout_seed=7),
        cache=UsedCache(name=1, version=2, length=3),
    ),
    Backward(**WORK, step=1, adapter=None, adapter_sum=None, adapter_gradients=False),
    Backward(**WORK, step=1, adapter=None, adapter_sum=AdapterSum(name=1, position=0), adapter_gradients=True),
    Adapter(
        session=SESSION,
        epoch=EPOCH,
        request=1,
        version=VERSION,
        dtype="f32",
        offset=0,
        nbytes=32,
        tensors=[TensorDescriptor(role="weights", dtype="u8", shape=(32,), nbytes=32)],
    ),
    WeightNorms(session=SESSION, epoch=EPOCH, request=1, path="2.up"),
    Release(session=SESSION, epoch=EPOCH, step=1),
    Cancel(session=SESSION, epoch=EPOCH, request=1),
    Ping(session=SESSION, epoch=EPOCH, request=1),
    Bye(session=SESSION, epoch=EPOCH),
    StatusRequest(request=1),
    Welcome(
        request=1,
        software="0",
        epoch=EPOCH,
        session=SESSION,
        model=IDENTITY,
        cut=CUT,
        dtype="bf16",
        quantization="4bit",
        forward_only=False,
        packs=True,
        deterministic=False,
        trunk_parameters=3,
        adapters=AdapterLimits(max_rank=8, max_bytes=9),
        reveals=["router_logits"],
        caches=True,
        limits=LIMITS,
        connection=b"c" * 16,
    ),
    Result(session=SESSION, request=1, epoch=EPOCH, merged=1, queue_us=0, compute_us=0, tensors=[ACTIVATIONS]),
    Error(request=None, session=None, epoch=EPOCH, code="MALFORMED", retry="never", retry_after_ms=0, text="no"),
    Pong(session=SESSION, request=1, epoch=EPOCH, progress_age_ms=0, inflight_requests=0),
    GoAway(session=SESSION, epoch=EPOCH, drain_ms=0),
    Status(
        request=1,
        software="0",
        epoch=EPOCH,
        model=IDENTITY,
        cut=CUT,
        dtype="f32",
        quantization=None,
        forward_only=True,
        trunk_parameters=3,
        sessions=0,
        queued_requests=0,
        held_bytes=0,
        adapter_bytes=0,
        cache_bytes=0,
    ),
]


def schemas_for(header: Header) -> dict[int, type[Header]]:
    return TO_DAEMON if type(header) in TO_DAEMON.values() else TO_CLIENT


def resealed(preamble: Frame, *rest: Frame) -> list[Frame]:
    """Changed frames, with the checksum that makes them whole."""
    return seal([preamble[: KIND.size], *rest])


def buffers_of(header: Header) -> list[bytes]:
    return [bytes(descriptor.nbytes) for descriptor in getattr(header, "tensors", [])]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: type(header).__name__)
def test_every_message_comes_back_as_it_was_sent(header: Header) -> None:
    message = decode(encode(header, buffers_of(header)), schemas_for(header))
    assert message.header == header
    assert type(message.header) is type(header)


def test_every_type_has_a_schema_and_a_round_trip() -> None:
    assert {header.TYPE for header in HEADERS} == set(MessageType)
    assert {*TO_DAEMON.values(), *TO_CLIENT.values()} == {type(header) for header in HEADERS}


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: type(header).__name__)
def test_every_field_is_needed_and_no_other_is_taken(header: Header) -> None:
    preamble, packed, *buffers = encode(header, buffers_of(header))
    fields = msgpack.unpackb(packed)
    for name in fields:
        fewer = msgpack.packb({key: value for key, value in fields.items() if key != name})
        with pytest.raises(MalformedError):
            decode(resealed(preamble, fewer, *buffers), schemas_for(header))
    with pytest.raises(MalformedError, match="extra"):
        decode(resealed(preamble, msgpack.packb({**fields, "extra": 1}), *buffers), schemas_for(header))


WRONG_VALUES = [None, True, -1, 2**64 - 1, 1.5, float("nan"), "x", "x" * 1000, b"", b"x" * 15, [], {}, [[]], {"a": 1}]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: type(header).__name__)
def test_a_value_of_a_wrong_type_or_size_is_refused(header: Header) -> None:
    """For every field, every wrong value either is refused or is within the field's own bounds."""
    preamble, packed, *buffers = encode(header, buffers_of(header))
    fields = msgpack.unpackb(packed)
    refused = 0
    for name in fields:
        for value in WRONG_VALUES:
            frames = resealed(preamble, msgpack.packb({**fields, name: value}), *buffers)
            try:
                taken = getattr(decode(frames, schemas_for(header)).header, name)
            except WireError:
                refused += 1
                continue
            assert taken == value, f"{name}: {value!r} became {taken!r}"
    assert refused > 5 * len(fields)


def test_a_number_that_would_keep_a_client_spinning_or_waiting_is_refused() -> None:
    error = next(header for header in HEADERS if isinstance(header, Error)).model_dump()
    for schema, fields, name, values in (
        (Limits, LIMITS.model_dump(), "ping_ms", (0, 1, 60_001)),
        (Limits, LIMITS.model_dump(), "max_inflight_requests", (0,)),
        (Limits, LIMITS.model_dump(), "max_request_tokens", (0,)),
        (Limits, LIMITS.model_dump(), "max_row_tokens", (0,)),
        (Limits, LIMITS.model_dump(), "max_message_bytes", (MAX_TENSOR_BYTES + 1,)),
        (Error, error, "retry_after_ms", (-1, 60_001)),
    ):
        for value in values:
            with pytest.raises(ValidationError) as caught:
                schema.model_validate({**fields, name: value})
            assert [problem["loc"] for problem in caught.value.errors()] == [(name,)]


def test_a_message_for_the_other_end_is_refused() -> None:
    with pytest.raises(MalformedError, match=f"type {MessageType.STATUS}\\b"):
        decode(encode(StatusRequest(request=1)), {})
    welcome = next(header for header in HEADERS if isinstance(header, Welcome))
    with pytest.raises(MalformedError, match=f"type {MessageType.WELCOME}\\b"):
        decode(encode(welcome), TO_DAEMON)


def kind(major: int = MAJOR, message_type: int = MessageType.FORWARD, flags: int = 0) -> bytes:
    """The first half of a preamble."""
    return KIND.pack(MAGIC, major, message_type, flags)


def forward_frames(*buffers: bytes, **changes: Any) -> list[Frame]:
    """The frames of a good FORWARD, with fields of its header, or its buffers, replaced."""
    header = HEADERS[1].model_dump() | changes
    return seal([kind(), msgpack.packb(header), *(buffers or [bytes(32)])])


def descriptor(**changes: Any) -> dict[str, Any]:
    return ACTIVATIONS.model_dump() | changes


GOOD = forward_frames()
BAD_FRAMES: dict[str, tuple[list[Frame], type[WireError]]] = {
    "no frame": ([], MalformedError),
    "one frame": (GOOD[:1], MalformedError),
    "empty frames": ([b"", b"", b""], MalformedError),
    "17 buffers": (resealed(*GOOD[:2], *[b""] * 17), MalformedError),
    "10,000 frames": (resealed(*GOOD[:2], *[b""] * 10_000), MalformedError),
    "wrong magic": ([b"HTTP/1.1", *GOOD[1:]], MalformedError),
    "short preamble": ([GOOD[0][:7], *GOOD[1:]], MalformedError),
    "half a preamble": ([GOOD[0][:8], *GOOD[1:]], MalformedError),
    "long preamble": ([GOOD[0] + b"\0", *GOOD[1:]], MalformedError),
    "major 0": (resealed(kind(major=0), *GOOD[1:]), ProtocolVersionError),
    "major 255": (resealed(kind(major=255), *GOOD[1:]), ProtocolVersionError),
    "type 0": (resealed(kind(message_type=0), *GOOD[1:]), MalformedError),
    "type 255": (resealed(kind(message_type=255), *GOOD[1:]), MalformedError),
    "unknown flags": (resealed(kind(flags=2), *GOOD[1:]), MalformedError),
    "large header": (resealed(GOOD[0], bytes(MAX_HEADER_BYTES + 1), GOOD[2]), TooLargeError),
    "truncated header": (resealed(GOOD[0], GOOD[1][:-1], GOOD[2]), MalformedError),
    "trailing byte": (resealed(GOOD[0], GOOD[1] + b"\0", GOOD[2]), MalformedError),
    "reserved byte": (resealed(GOOD[0], b"\xc1", GOOD[2]), MalformedError),
    "array of 4 G": (resealed(GOOD[0], b"\xdd\xff\xff\xff\xff", GOOD[2]), MalformedError),
    "map of 4 G": (resealed(GOOD[0], b"\xdf\xff\xff\xff\xff", GOOD[2]), MalformedError),
    "bytes of 4 G": (resealed(GOOD[0], b"\xc6\xff\xff\xff\xff", GOOD[2]), MalformedError),
    "500 deep": (resealed(GOOD[0], b"\x91" * 500 + b"\x90", GOOD[2]), MalformedError),
    "10,000 deep": (resealed(GOOD[0], b"\x91" * 10_000 + b"\x90", GOOD[2]), MalformedError),
    "a list": (resealed(GOOD[0], msgpack.packb([1]), GOOD[2]), MalformedError),
    "integer keys": (resealed(GOOD[0], msgpack.packb({1: 1}), GOOD[2]), MalformedError),
    "a key twice": (resealed(GOOD[0], b"\x82" + msgpack.packb("request") * 2 + b"\x01\x01", GOOD[2]), MalformedError),
    "an ext type": (resealed(GOOD[0], msgpack.packb(msgpack.ExtType(5, b"x")), GOOD[2]), MalformedError),
    "a timestamp": (forward_frames(request=msgpack.Timestamp(1)), MalformedError),
    "a pickle": (resealed(GOOD[0], b"\x80\x04cos\nsystem\n", GOOD[2]), MalformedError),
    "bad UTF-8": (resealed(GOOD[0], b"\x81\xa2\xff\xfe\x01", GOOD[2]), MalformedError),
    "no tensors": (forward_frames(tensors=[]), MalformedError),
    "17 tensors": (forward_frames(tensors=[descriptor()] * 17), MalformedError),
    "more described than sent": (forward_frames(tensors=[descriptor(), descriptor()]), MalformedError),
    "more sent than described": (resealed(*GOOD, b""), MalformedError),
    "a role twice": (forward_frames(bytes(32), bytes(32), tensors=[descriptor(), descriptor()]), MalformedError),
    "unknown role": (forward_frames(tensors=[descriptor(role="labels")]), MalformedError),
    "unknown dtype": (forward_frames(tensors=[descriptor(dtype="f64")]), MalformedError),
    "dtype __class__": (forward_frames(tensors=[descriptor(dtype="__class__")]), MalformedError),
    "shape is no list": (forward_frames(tensors=[descriptor(shape=32)]), MalformedError),
    "5 dims": (forward_frames(tensors=[descriptor(shape=[1, 1, 1, 2, 4])]), MalformedError),
    "negative dim": (forward_frames(tensors=[descriptor(shape=[-1, -2, 4])]), MalformedError),
    "bool dim": (forward_frames(tensors=[descriptor(shape=[True, 2, 4])]), MalformedError),
    "huge dims": (forward_frames(tensors=[descriptor(shape=[2**31, 2**31])]), MalformedError),
    "product over 2^64": (forward_frames(tensors=[descriptor(shape=[2**31 - 1] * 4)]), MalformedError),
    "nbytes is not the shape's": (forward_frames(tensors=[descriptor(nbytes=31)]), MalformedError),
    "the frame is not nbytes": (forward_frames(bytes(31)), MalformedError),
    "odd bytes of bf16": (
        forward_frames(bytes(1), tensors=[descriptor(dtype="bf16", shape=[1], nbytes=1)]),
        MalformedError,
    ),
    "a flipped bit of the header": ([GOOD[0], bytes([GOOD[1][0] ^ 1]) + GOOD[1][1:], GOOD[2]], CorruptError),
    "a flipped bit of a tensor": ([*GOOD[:2], b"\1" + bytes(31)], CorruptError),
    "a flipped bit of the checksum": ([GOOD[0][:-1] + bytes([GOOD[0][-1] ^ 1]), *GOOD[1:]], CorruptError),
    "another type": ([kind(message_type=MessageType.BACKWARD) + GOOD[0][8:], *GOOD[1:]], CorruptError),
    "a byte that moved to the next frame": ([GOOD[0], GOOD[1][:-1], GOOD[1][-1:] + bytes(32)], CorruptError),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_are_refused(name: str) -> None:
    frames, expected = BAD_FRAMES[name]
    with pytest.raises(expected):
        decode(frames, TO_DAEMON)


def test_good_frames_are_taken() -> None:
    """So that the bad ones fail for what their names say."""
    assert isinstance(decode(GOOD, TO_DAEMON).header, Forward)


def test_without_a_checksum_of_buffers_all_but_their_content_is_covered() -> None:
    preamble, header, buffer = unchecked = encode(HEADERS[1], [bytes(32)], checked=False)
    assert decode(GOOD, TO_DAEMON).checked and not decode(unchecked, TO_DAEMON).checked
    assert decode([preamble, header, b"\1" * 32], TO_DAEMON).buffers == (b"\1" * 32,)
    for damaged in (
        [kind() + preamble[KIND.size :], header, buffer],  # without the flag
        [preamble, header[:-1] + bytes([header[-1] ^ 1]), buffer],
        [preamble, header, bytes(31)],
        [kind(flags=UNCHECKED_BUFFERS) + bytes(8), header, buffer],
    ):
        with pytest.raises(CorruptError):
            decode(damaged, TO_DAEMON)
    assert seal_again(unchecked, checked=True) == encode(HEADERS[1], [bytes(32)])
    assert seal_again(GOOD, checked=False)[0] == encode(HEADERS[1], [bytes(32)], checked=False)[0]


def test_an_error_knows_the_request_that_it_refuses() -> None:
    with pytest.raises(MalformedError) as caught:
        decode(forward_frames(request=77, keep="yes"), TO_DAEMON)
    assert caught.value.request == 77
    with pytest.raises(MalformedError) as caught:
        decode(forward_frames(request="77"), TO_DAEMON)
    assert caught.value.request is None


def test_an_error_does_not_quote_values() -> None:
    with pytest.raises(MalformedError) as caught:
        decode(forward_frames(keep="the client's secret"), TO_DAEMON)
    assert "secret" not in str(caught.value)


@given(st.lists(st.binary(max_size=64), max_size=6))
def test_arbitrary_frames_raise_nothing_but_wire_errors(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames, TO_DAEMON)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary()
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=9), scalars, max_size=3)


@given(st.sampled_from(sorted(TO_DAEMON)), st.dictionaries(st.sampled_from([*Forward.model_fields, "model"]), values))
def test_arbitrary_headers_raise_nothing_but_wire_errors(message_type: int, fields: dict[str, Any]) -> None:
    frames = seal([kind(message_type=message_type), msgpack.packb(fields)])
    try:
        decode(frames, TO_DAEMON)
    except WireError:
        pass


@given(st.integers(0, len(b"".join(GOOD)) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed_wherever_it_is(position: int, flip: int) -> None:
    frames = [bytearray(frame) for frame in GOOD]
    for frame in frames:
        if position < len(frame):
            frame[position] ^= flip
            break
        position -= len(frame)
    with pytest.raises(WireError):
        decode([bytes(frame) for frame in frames], TO_DAEMON)


@given(st.integers(0, len(GOOD[1]) - 1), st.integers(1, 255))
def test_a_changed_byte_of_a_header_that_was_sealed_so_gives_a_message_or_a_wire_error(
    position: int, flip: int
) -> None:
    header = bytearray(GOOD[1])
    header[position] ^= flip
    try:
        decode(resealed(GOOD[0], bytes(header), *GOOD[2:]), TO_DAEMON)
    except WireError:
        pass


MOST_CALLS = 300  # in Python and out of it: the first thing that no header has ends the look at it
MOST_BYTES = 1 << 20
LONGEST_HEADERS = [
    b"\xdc\x3f\x00" + b"\x80" * 0x3F00,  # an array of empty maps
    b"\xde\x1f\x00" + b"".join(b"\xcd%c%c\x80" % divmod(n, 256) for n in range(0x0FE0)),
    b"\x91" * 500 + b"\x90",
    b"\x81" * (MAX_HEADER_BYTES - 1),
    msgpack.packb({f"{n:04}": [{}] * 3 for n in range(1_300)}),
    b"\xdc\x15\x00" + b"\xd4\x05\x00" * 0x1500,  # ext types
    (b"\x9f" + b"\x80" * 14) * 1_000,  # empty maps, never more than 15 in a list
    *(
        msgpack.packb({"tensors": tensors})
        for tensors in (
            [descriptor(shape=[None] * 16_000)],
            [descriptor(shape=[None] * 16)] * 16,
            [descriptor(**{f"{n:x}": 0 for n in range(3_000)})],
            [descriptor(**{f"{n:x}": 0 for n in range(10)})] * 16,
            [{}] * 16_000,
            [None] * 16_000,
        )
    ),
]
MOST_COMPLAINTS = 64  # of pydantic about one header; each is an object


def work_of(frames: list[Frame]) -> tuple[int, int]:
    """Measure the decoding of a message: calls, and peak bytes. (Seconds would be chance.)"""
    calls = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count_call)
    try:
        decode(frames, TO_DAEMON)
    except WireError:
        pass
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return calls, peak


def assert_bounded(frames: list[Frame]) -> None:
    calls, peak = work_of(frames)
    assert calls <= MOST_CALLS and peak <= MOST_BYTES, (calls, peak)


@pytest.mark.parametrize("number", range(len(LONGEST_HEADERS)))
def test_the_work_for_the_longest_headers_is_bounded(number: int) -> None:
    for message_type in TO_DAEMON:
        assert_bounded(seal([kind(message_type=message_type), LONGEST_HEADERS[number], bytes(32)]))


@pytest.mark.parametrize("number", range(len(LONGEST_HEADERS)))
def test_the_complaints_about_the_longest_headers_are_bounded(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    complaints = 0

    def counted(schema: type[Header], error: ValidationError) -> str:
        nonlocal complaints
        complaints += error.error_count()
        return ""

    monkeypatch.setattr("zsl.wire.frames._first_problem", counted)
    for message_type in TO_DAEMON:
        with pytest.raises(WireError):
            decode(seal([kind(message_type=message_type), LONGEST_HEADERS[number], bytes(32)]), TO_DAEMON)
    assert complaints <= MOST_COMPLAINTS * len(TO_DAEMON)


@given(st.integers(0, 2**32 - 1))
def test_the_work_for_damaged_messages_is_bounded(seed: int) -> None:
    for frames in itertools.islice(mutated([[bytes(frame) for frame in GOOD]], random.Random(seed)), 5):
        assert_bounded(list(frames))


@given(
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(0, 5), max_size=MAX_DIMS),
)
def test_a_descriptor_takes_exactly_its_own_number_of_bytes(dtype: str, shape: list[int]) -> None:
    elements = 1
    for dim in shape:
        elements *= dim
    nbytes = elements * DTYPE_BYTES[dtype]
    good = descriptor(dtype=dtype, shape=shape, nbytes=nbytes)
    assert decode(forward_frames(bytes(nbytes), tensors=[good]), TO_DAEMON).buffers == (bytes(nbytes),)
    with pytest.raises(MalformedError):
        decode(forward_frames(bytes(nbytes + 1), tensors=[good]), TO_DAEMON)


@pytest.mark.parametrize(
    "character", ["\x07", "\x1b", "\n", "\r", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066", "\ufeff"]
)
def test_a_name_with_a_control_character_is_refused_and_a_text_with_it_escaped(character: str) -> None:
    with pytest.raises(ValidationError, match=r"1 validation error.*\n+software\n"):
        Hello(request=1, software=f"0{character}", dtype="f32", model=None, cut=None, resume=None)
    with pytest.raises(ValidationError, match=r"1 validation error.*\n+model_type\n"):
        ModelIdentity.model_validate(IDENTITY.model_dump() | {"model_type": character})
    fields = {
        "request": 1,
        "epoch": b"e" * 16,
        "code": "INTERNAL",
        "retry": Retry.NEVER,
        "retry_after_ms": 0,
        "session": None,
    }
    sent = Error.model_validate({**fields, "text": character * MAX_TEXT_CHARS})
    read = decode(encode(sent), TO_CLIENT).header
    assert isinstance(read, Error) and is_printable(read.text) and 500 < len(read.text) <= MAX_TEXT_CHARS
    assert read.text.startswith(printable(character))


def test_every_schema_fits_the_bounds_of_a_header() -> None:
    schemas = [*TO_DAEMON.values(), *TO_CLIENT.values(), TensorDescriptor, Limits, ModelIdentity]
    assert max(len(schema.model_fields) for schema in schemas) <= MAX_KEYS
    assert max(MAX_TENSORS, MAX_DIMS) <= MAX_ITEMS
