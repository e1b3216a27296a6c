"""Batch sizes follow from what passes cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsl.trunk.costs import (
    MAX_BATCH_TOKENS,
    MIN_BATCH_TOKENS,
    MIN_MERGE_TOKENS,
    Costs,
    PassCost,
    batch_limits,
    fit_cost,
)

seconds = st.floats(1e-6, 10)


@given(seconds, seconds)
def test_a_line_is_found_again(fixed: float, per_token: float) -> None:
    cost = PassCost(fixed, per_token)
    found = fit_cost([(tokens, cost.seconds(tokens)) for tokens in (8, 32, 96)])
    assert found.fixed_seconds == pytest.approx(fixed, rel=1e-3, abs=1e-5 * per_token + 1e-9)
    assert found.seconds_per_token == pytest.approx(per_token, rel=1e-3, abs=1e-8)


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 10)), min_size=1, max_size=6))
def test_no_sample_however_noisy_gives_a_negative_cost(samples: list[tuple[int, float]]) -> None:
    cost = fit_cost(samples)
    assert cost.fixed_seconds >= 0 and cost.seconds_per_token > 0


@given(st.builds(Costs, *[st.builds(PassCost, seconds, seconds)] * 3))
def test_whatever_is_measured_the_limits_are_usable(costs: Costs) -> None:
    limits = batch_limits(costs)
    assert MIN_BATCH_TOKENS <= limits.max_batch_tokens <= MAX_BATCH_TOKENS
    assert MIN_MERGE_TOKENS <= limits.merge_below_tokens <= limits.max_batch_tokens // 4


def test_the_budget_is_where_the_fixed_part_is_a_tenth() -> None:
    cost = PassCost(0.080, 0.0018)
    limits = batch_limits(Costs(cost, cost, cost))
    fixed_share = cost.fixed_seconds / cost.seconds(limits.max_batch_tokens)
    assert fixed_share == pytest.approx(0.1, rel=0.02)


def test_where_a_merged_backward_costs_much_more_only_small_requests_are_merged() -> None:
    forward, backward = PassCost(0.040, 0.0018), PassCost(0.040, 0.0018)
    knees = [
        batch_limits(Costs(forward, backward, PassCost(0.040, per_token))).merge_below_tokens
        for per_token in (0.0018, 0.0028, 0.02)
    ]
    assert knees == sorted(knees, reverse=True) and knees[0] > knees[-1] == MIN_MERGE_TOKENS
