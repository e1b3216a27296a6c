"""A request's sharing of a pass is decided once, from its tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.echo import HIDDEN, TRAITS
from zsl.errors import BadShapeError, MalformedError, NonFiniteError, TooLargeError
from zsl.trunk.costs import BatchLimits
from zsl.trunk.requests.validate import check_forward, sharing_of
from zsl.trunk.settings import ServerSettings, TrunkInfo, TrunkTraits
from zsl.trunk.work import Alone, Batch, Buffers, Keep, Kind, Packed, Shape, Sharing, Stacked, Work
from zsl.wire.adapter_layout import PrefixLayer
from zsl.wire.messages import Cut, ModelIdentity, Role, TensorDescriptor

POSITIONS = 8
IDENTITY = ModelIdentity(model_type="x", layers=6, hidden_size=HIDDEN, config_digest="c" * 64, weights_digest="d" * 64)
LIMITS = ServerSettings().limits(TrunkInfo(IDENTITY, Cut(start=2, stop=4), "f32", False, POSITIONS))
PLAIN_ONLY = replace(TRAITS, batch_limits=BatchLimits(64, 16))
ALL = replace(PLAIN_ONLY, packs_masks=True, packs_restarts=True)
STACKS = replace(PLAIN_ONLY, packs=False)
DETERMINISTIC = replace(PLAIN_ONLY, deterministic=True)


def request(rows: int, tokens: int, **beside: list[Any]) -> Buffers:
    """Activations `[rows, tokens, HIDDEN]`, with tensors of integers beside them."""
    arrays: dict[str, np.ndarray[Any, Any]] = {"activations": np.ones((rows, tokens, HIDDEN), dtype=np.float32)}
    arrays |= {role: np.array(values, dtype=np.int64) for role, values in beside.items()}
    dtypes = {"f": "f32", "i": "i64"}
    buffers: dict[Role, Any] = {}
    for role, array in arrays.items():
        fields = {"role": role, "dtype": dtypes[array.dtype.kind], "shape": array.shape, "nbytes": array.nbytes}
        buffers[role] = (TensorDescriptor(**fields), array.data.cast("B"))  # type: ignore[arg-type, index]
    return buffers


def shape(buffers: Buffers) -> Shape:
    return check_forward(buffers, HIDDEN, LIMITS)


RESTARTS = [0, 1, 0, 1, 2]
CASES: list[tuple[str, Buffers, TrunkTraits, Sharing]] = [
    ("plain", request(2, 5), PLAIN_ONLY, Packed()),
    ("plain, does not pack", request(2, 5), STACKS, Stacked(5, has_mask=False, has_positions=False)),
    ("large", request(4, 5), ALL, Alone()),
    ("nothing merges", request(2, 5), replace(ALL, merges=False), Alone()),
    ("mask", request(1, 2, attention_mask=[[0, 1]]), ALL, Packed()),
    ("mask, not packed", request(1, 2, attention_mask=[[0, 1]]), PLAIN_ONLY, Stacked(2, True, False)),
    ("mask of ones, not packed", request(1, 2, attention_mask=[[1, 1]]), PLAIN_ONLY, Stacked(2, True, False)),
    ("mask, deterministic", request(1, 2, attention_mask=[[0, 1]]), DETERMINISTIC, Alone()),
    ("positions", request(2, 3, position_ids=[[3, 4, 5]]), PLAIN_ONLY, Packed()),
    ("restarts", request(1, 5, position_ids=[RESTARTS]), ALL, Packed()),
    ("restarts, not packed", request(1, 5, position_ids=[RESTARTS]), PLAIN_ONLY, Stacked(5, False, True)),
    ("restarts, deterministic", request(1, 5, position_ids=[RESTARTS]), DETERMINISTIC, Alone()),
    ("lengths", request(1, 5, lengths=[2, 3]), PLAIN_ONLY, Packed()),
    ("lengths and restarts", request(1, 5, lengths=[2, 3], position_ids=[RESTARTS]), PLAIN_ONLY, Packed()),
]


@pytest.mark.parametrize(("buffers", "traits", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_the_way_to_share_follows_from_the_request_and_the_trunk(
    buffers: Buffers, traits: TrunkTraits, expected: Sharing
) -> None:
    assert sharing_of(buffers, shape(buffers), traits) == expected


def test_positions_that_do_not_count_up_by_one_begin_a_sequence() -> None:
    assert shape(request(2, 5, position_ids=[RESTARTS])).lengths == (2, 3, 2, 3)
    assert shape(request(2, 3, position_ids=[[0, 1, 2], [0, 2, 2]])).lengths == (3, 1, 1, 1)
    assert shape(request(2, 3, position_ids=[[5, 6, 7], [0, 1, 2]])).lengths == (3, 3)


def test_beside_a_mask_a_row_is_one_sequence_whatever_its_positions() -> None:
    found = shape(request(2, 5, attention_mask=[[1] * 5, [0, 0, 1, 1, 1]], position_ids=[RESTARTS]))
    assert found.lengths == (5, 5) and found.masked == {1}


def test_a_row_may_be_longer_than_the_positions_that_start_again_in_it() -> None:
    positions = [[*range(7), *range(3)]]
    packed_row, masked_row = (
        request(1, 10, position_ids=positions, **mask) for mask in ({}, {"attention_mask": [[1] * 10]})
    )
    assert shape(packed_row).lengths == (7, 3) and not shape(packed_row).fits_rows
    assert shape(masked_row).lengths == (10,) and not shape(masked_row).fits_rows
    assert sharing_of(packed_row, shape(packed_row), ALL) == Packed()
    assert sharing_of(packed_row, shape(packed_row), PLAIN_ONLY) == Stacked(10, False, True)
    for positionless in (request(1, 10), request(1, 10, attention_mask=[[1] * 10])):
        with pytest.raises(TooLargeError):
            shape(positionless)
    with pytest.raises(BadShapeError):
        shape(request(1, 10, position_ids=[[*range(1, 11)]]))


def test_a_prefix_counts_in_the_mask_the_lengths_and_the_limits() -> None:
    def with_prefix(buffers: Buffers, tokens: int = 3, rows: int = 1) -> Shape:
        prefix = PrefixLayer(path="2", rows=rows, tokens=tokens, heads=1, dim=1)
        return check_forward(buffers, HIDDEN, LIMITS, prefix)

    found = with_prefix(request(2, 2, attention_mask=[[1] * 5, [1, 1, 1, 0, 1]], position_ids=[[5, 3]]))
    assert (found.lengths, found.masked, found.total_tokens) == ((5, 5), {1}, 4)
    for buffers in (request(1, 2, attention_mask=[[1, 1]]), request(1, 5, lengths=[2, 3])):
        with pytest.raises(BadShapeError):
            with_prefix(buffers)
    with_prefix(request(1, 5, position_ids=[[0, 1, 2, 0, 1]]))
    for positions in ({}, {"position_ids": [[0, 1, 2, 0, 1, 2]]}):
        with pytest.raises(TooLargeError):
            with_prefix(request(1, 6, **positions))
    with pytest.raises(TooLargeError):
        with_prefix(request(1, 2), 10**6)
    assert with_prefix(request(2, 2), rows=2).lengths == (5, 5)
    with pytest.raises(BadShapeError):
        with_prefix(request(3, 2), rows=2)


def test_lengths_are_refused_where_sequences_cannot_be_kept_apart() -> None:
    buffers = request(1, 5, lengths=[2, 3])
    with pytest.raises(MalformedError):
        sharing_of(buffers, shape(buffers), STACKS)


@pytest.mark.parametrize(("lengths", "mask"), [([2, 2], None), ([0, 5], None), ([6], None), ([5], [[1] * 5])])
def test_lengths_that_do_not_make_up_one_row_are_refused(lengths: list[int], mask: list[Any] | None) -> None:
    beside = {} if mask is None else {"attention_mask": mask}
    with pytest.raises(BadShapeError):
        shape(request(1, 5, lengths=lengths, **beside))


def test_works_that_may_not_share_a_pass_make_no_batch() -> None:
    def work(sharing: Sharing, kind: Kind = Kind.FORWARD) -> Work:
        return Work(kind, {}, Shape(1, 1, (1,)), sharing, Keep.NOTHING)

    stacked = Stacked(1, has_mask=False, has_positions=False)
    Batch((work(Alone()),))
    Batch((work(Packed()), work(Packed())))
    Batch((work(stacked), work(stacked)))
    for works in (
        (),
        (work(Alone()), work(Alone())),
        (work(Packed()), work(stacked)),
        (work(stacked), work(replace(stacked, has_mask=True))),
        (work(Packed()), work(Packed(), Kind.BACKWARD)),
    ):
        with pytest.raises(ValueError, match="share a pass"):
            Batch(works)


def test_a_request_over_the_limits_or_without_tokens_is_refused() -> None:
    limits = LIMITS.model_copy(update={"max_request_tokens": 6})
    assert check_forward(request(2, 3), HIDDEN, limits).total_tokens == 6
    with pytest.raises(TooLargeError):
        check_forward(request(3, 3), HIDDEN, limits)
    for wrong in ((0, 1, HIDDEN), (1, 0, HIDDEN), (1, HIDDEN)):
        buffer = np.zeros(wrong, dtype=np.float32).tobytes()
        descriptor = TensorDescriptor(role="activations", dtype="f32", shape=wrong, nbytes=len(buffer))
        with pytest.raises(BadShapeError):
            shape({"activations": (descriptor, memoryview(buffer))})


@pytest.mark.parametrize(
    ("dtype", "bits"), [("f32", 0x7F800000), ("f32", 0x7FC00000), ("f16", 0x7C00), ("bf16", 0x7F80)]
)
def test_an_activation_that_is_not_finite_is_refused_with_its_place(dtype: str, bits: int) -> None:
    values = np.zeros((2, 3, HIDDEN), dtype=np.uint32 if dtype == "f32" else np.uint16)
    values[1, 2, 0] = bits
    descriptor = TensorDescriptor(role="activations", dtype=dtype, shape=values.shape, nbytes=values.nbytes)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="row 1, token 2"):
        shape({"activations": (descriptor, values.data.cast("B"))})
