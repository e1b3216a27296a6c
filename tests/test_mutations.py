"""Damaged messages are of many kinds, the same for the same seed, and `decode` survives all of them."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import msgpack

from support.mutations import mutated
from zsl.errors import WireError
from zsl.wire.frames import decode, encode
from zsl.wire.messages import TO_DAEMON, Backward, Bye, Cut, Forward, Hello, ModelIdentity, Ping, TensorDescriptor

SESSION, EPOCH = b"s" * 16, b"e" * 16
MODEL = ModelIdentity(model_type="gpt2", layers=6, hidden_size=4, config_digest="0" * 64, weights_digest="a" * 64)
ACTIVATIONS = TensorDescriptor(role="activations", dtype="f32", shape=(1, 2, 4), nbytes=32)
GRADIENTS = TensorDescriptor(role="gradients", dtype="f32", shape=(1, 2, 4), nbytes=32)
MASK = TensorDescriptor(role="attention_mask", dtype="u8", shape=(1, 2), nbytes=2)
WORK = {"session": SESSION, "epoch": EPOCH, "attempt": 0, "budget_ms": 20_000}
MESSAGES = [
    [bytes(frame) for frame in encode(header, [b"\1" * tensor.nbytes for tensor in getattr(header, "tensors", [])])]
    for header in (
        Hello(request=1, software="0", dtype="f32", model=MODEL, cut=Cut(start=2, stop=4), resume=None),
        Forward(request=2, adapter=None, keep=True, reveal=[], cache=None, tensors=[ACTIVATIONS, MASK], **WORK),
        Backward(
            request=3, step=2, adapter=None, adapter_sum=None, adapter_gradients=False, tensors=[GRADIENTS], **WORK
        ),
        Ping(session=SESSION, epoch=EPOCH, request=4),
        Bye(session=SESSION, epoch=EPOCH),
    )
]


def some(count: int, seed: int = 0) -> list[list[bytes]]:
    return list(islice(mutated(MESSAGES, Random(seed)), count))


def test_the_same_seed_gives_the_same_messages_and_another_one_gives_others() -> None:
    assert some(100) == some(100)
    assert some(100) != some(100, seed=1)


def test_no_message_is_as_it_was_and_few_are_alike() -> None:
    before = [list(message) for message in MESSAGES]
    messages = some(2000)
    assert len({tuple(message) for message in messages}) > 1500
    assert before == MESSAGES


def test_every_kind_of_damage_is_among_them_and_decode_raises_nothing_but_wire_errors() -> None:
    outcomes: Counter[str] = Counter()
    for message in some(5000):
        try:
            outcomes["taken"] += bool(decode(message, TO_DAEMON).header)
        except WireError as error:
            outcomes[error.code] += 1
    assert outcomes.keys() >= {"taken", "CORRUPT", "MALFORMED", "TOO_LARGE", "PROTO_VERSION"}
    assert outcomes["CORRUPT"] < 2500, "the checksum hides what is behind it"
    assert outcomes["taken"] > 100


def test_every_field_of_a_header_is_changed_at_some_time() -> None:
    good = msgpack.unpackb(MESSAGES[1][1])
    changed: set[str] = set()
    for message in some(5000):
        try:
            header = msgpack.unpackb(message[1])
            changed |= {name for name in good if header.keys() == good.keys() and header[name] != good[name]}
        except (IndexError, AttributeError, ValueError, msgpack.UnpackException):
            continue
    assert changed == set(good)
