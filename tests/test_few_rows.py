"""A product of few rows is computed the way round that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from zsl.trunk.compute.few_rows import MEASURED_ROWS, REPEATS, most_swapped_rows, swapped_linear

SIZES = st.integers(1, 40)


@given(st.integers(1, 3), st.integers(1, 8), SIZES, SIZES, st.booleans())
def test_a_swapped_product_is_that_of_linear_but_for_rounding(
    rows: int, tokens: int, inputs: int, outputs: int, has_bias: bool
) -> None:
    random = torch.Generator().manual_seed(rows * tokens + inputs * outputs)
    x = torch.randn(rows, tokens, inputs, generator=random)
    weight = torch.randn(outputs, inputs, generator=random)
    bias = torch.randn(outputs, generator=random) if has_bias else None
    found = swapped_linear(x, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, weight, bias))


def clock_of(seconds: list[float]) -> Callable[[], float]:
    """A clock on which the products take these seconds in turn."""

    def times() -> Iterator[float]:
        now = 0.0
        for each in seconds:
            for _ in range(REPEATS):
                yield now
                now += each
                yield now

    return times().__next__


@pytest.mark.parametrize(
    ("swapped_seconds", "most"),
    [((1.0, 1.0, 1.0), 8), ((1.0, 1.0, 2.0), 4), ((1.0, 2.0, 1.0), 2), ((1.95, 1.0, 1.0), 0)],
)
def test_rows_are_swapped_up_to_the_number_at_which_that_stops_being_faster(
    swapped_seconds: tuple[float, ...], most: int
) -> None:
    seconds = [each for swapped in swapped_seconds for each in (swapped, 2.0)]
    assert len(swapped_seconds) == len(MEASURED_ROWS)
    assert most_swapped_rows([torch.ones(3, 2), torch.ones(4, 3)], clock_of(seconds)) == most


def test_a_trunk_without_plain_linear_layers_swaps_nothing() -> None:
    assert most_swapped_rows([]) == 0
