"""The scheduler: every job runs once, in fair order, and merges only what may be merged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, cycle
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsl.trunk.costs import Costs, PassCost
from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.scheduling.scheduler import AGED_BATCH_EVERY, Scheduler
from zsl.trunk.work import Kind

BUDGET = 100
keys = count()

jobs = st.lists(
    st.builds(
        Job,
        key=st.uuids(),
        tenant=st.sampled_from("abcd"),
        kind=st.sampled_from(Kind),
        tokens=st.integers(1, BUDGET),
        merge_key=st.sampled_from([None, "x", "y"]),
        cost_seconds=st.floats(0.01, 1),
        deadline=st.floats(1, 10),
    ),
    max_size=40,
)


def job(
    tenant: object = "a",
    tokens: int = 10,
    *,
    kind: Kind = Kind.FORWARD,
    merge_key: object = "x",
    deadline: float = 1e9,
) -> Job:
    return Job(next(keys), tenant, kind, tokens, merge_key, 0.01 + tokens / 1000, deadline)


def scheduler_with(queued: Sequence[Job], *, budget: int = BUDGET, max_wait_seconds: float = 1e9) -> Scheduler:
    scheduler = Scheduler(max_batch_tokens=budget, max_wait_seconds=max_wait_seconds)
    for one in queued:
        scheduler.add(one, now=0.0)
    return scheduler


def drained(scheduler: Scheduler) -> list[list[Job]]:
    batches = []
    while batch := scheduler.take_batch(now=0.0):
        scheduler.charge(batch, sum(one.cost_seconds for one in batch), now=0.0)
        batches.append(batch)
    return batches


@given(jobs)
def test_every_job_is_taken_once_and_the_device_never_waits_while_one_is_queued(queued: list[Job]) -> None:
    scheduler = scheduler_with(queued)
    taken = [one.key for batch in drained(scheduler) for one in batch]
    assert Counter(taken) == Counter(one.key for one in queued)
    assert len(scheduler) == 0
    assert scheduler.backlog_seconds == pytest.approx(0, abs=1e-9)


@given(jobs)
def test_a_batch_is_of_one_kind_and_key_and_within_the_budget(queued: list[Job]) -> None:
    for batch in drained(scheduler_with(queued)):
        assert len({(one.kind, one.merge_key) for one in batch}) == 1
        assert len(batch) == 1 or batch[0].merge_key is not None
        assert len(batch) == 1 or sum(one.tokens for one in batch) <= BUDGET


@given(jobs)
def test_a_tenants_jobs_of_one_kind_keep_their_order(queued: list[Job]) -> None:
    taken: dict[tuple[object, Kind], list[Job]] = defaultdict(list)
    for batch in drained(scheduler_with(queued)):
        for one in batch:
            taken[one.tenant, one.kind].append(one)
    for (tenant, kind), found in taken.items():
        assert found == [one for one in queued if (one.tenant, one.kind) == (tenant, kind)]


@given(jobs, st.data())
def test_jobs_that_free_a_graph_go_first_when_asked_for_in_fair_order_and_are_paid_for(
    queued: list[Job], data: st.DataObject
) -> None:
    training = [one for one in queued if one.kind is not Kind.DECODE]
    queued = [replace(one, frees_graph=one.kind is Kind.BACKWARD and data.draw(st.booleans())) for one in training]
    scheduler = scheduler_with(queued)
    used: Counter[object] = Counter()
    left = list(queued)
    while batch := scheduler.take_batch(now=0.0, frees_graphs=True):
        next_backwards = {one.tenant: one for one in reversed(left) if one.kind is Kind.BACKWARD}
        that_free = [tenant for tenant, one in next_backwards.items() if one.frees_graph]
        if that_free:
            assert batch[0].frees_graph
            assert used[batch[0].tenant] == pytest.approx(min(used[tenant] for tenant in that_free))
        seconds, tokens = sum(one.cost_seconds for one in batch), sum(one.tokens for one in batch)
        scheduler.charge(batch, seconds, now=0.0)
        for one in batch:
            used[one.tenant] += seconds * one.tokens / tokens  # type: ignore[assignment]
            left.remove(one)
    assert not left


@given(jobs, st.floats(0, 10))
def test_expired_jobs_leave_and_the_others_stay(queued: list[Job], now: float) -> None:
    scheduler = scheduler_with(queued)
    expired = scheduler.take_expired(now)
    assert {one.key for one in expired} == {one.key for one in queued if one.deadline <= now}
    left = {one.key for batch in drained(scheduler) for one in batch}
    assert left == {one.key for one in queued if one.deadline > now}


@given(jobs, st.data())
def test_a_discarded_job_is_not_taken(queued: list[Job], data: st.DataObject) -> None:
    scheduler = scheduler_with(queued)
    gone = set(data.draw(st.lists(st.sampled_from(queued), unique=True)) if queued else [])
    assert all(scheduler.discard(one.key) for one in gone)
    assert not any(scheduler.discard(one.key) for one in gone)
    assert {one for batch in drained(scheduler) for one in batch} == set(queued) - gone


def test_a_job_queued_twice_runs_once() -> None:
    twice = job()
    assert drained(scheduler_with([twice, twice])) == [[twice]]


def test_a_job_larger_than_the_budget_runs_alone() -> None:
    large, small = job(tokens=500), job("b", tokens=1)
    assert drained(scheduler_with([large, small])) == [[large], [small]] or drained(scheduler_with([large, small])) == [
        [small],
        [large],
    ]


def test_a_tenants_backward_goes_before_its_forward() -> None:
    forward, backward = job(kind=Kind.FORWARD), job(kind=Kind.BACKWARD)
    assert drained(scheduler_with([forward, backward])) == [[backward], [forward]]


def test_a_single_request_beside_a_flood_is_served_within_two_batches() -> None:
    for merge_key in ("x", None):
        scheduler = scheduler_with([job("flood", merge_key=merge_key) for _ in range(1000)])
        for _ in range(20):
            scheduler.charge(scheduler.take_batch(0.0), 0.1, 0.0)
        single = job("mouse", merge_key=merge_key)
        scheduler.add(single, 0.0)
        two = [scheduler.take_batch(0.0) for _ in range(2)]
        assert any(single in batch for batch in two), merge_key


def shares(
    weights: dict[str, float],
    tokens: dict[str, int],
    *,
    batches: int = 1000,
    slowness: float = 1.0,
    decoding: frozenset[str] = frozenset(),
    decode_share: float = 0.5,
) -> dict[str, float]:
    """The device time that always-backlogged tenants get; a pass takes `slowness` times what was expected."""
    scheduler = Scheduler(max_batch_tokens=BUDGET, decode_share=decode_share)
    used: dict[str, float] = dict.fromkeys(weights, 0.0)

    def add(tenant: str) -> None:
        # Every third is too large to be merged, so that batches of both sorts occur.
        kind = Kind.DECODE if tenant in decoding else Kind.FORWARD
        one = job(tenant, tokens[tenant], kind=kind, merge_key="x" if next(keys) % 3 else None)
        scheduler.add(one, 0.0, weight=weights[tenant])

    for tenant in weights:
        for _ in range(20):
            add(tenant)
    for _ in range(batches):
        batch = scheduler.take_batch(0.0)
        seconds = slowness * (0.01 + sum(one.tokens for one in batch) / 1000)
        for one in batch:
            used[str(one.tenant)] += seconds * one.tokens / sum(other.tokens for other in batch)
            add(str(one.tenant))
        scheduler.charge(batch, seconds, 0.0)
    return used


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1 / n when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@pytest.mark.parametrize("slowness", [0.2, 1.0, 5.0])
def test_equal_tenants_share_the_device_equally_whatever_the_size_of_their_requests(slowness: float) -> None:
    tokens = {"tiny": 1, "small": 7, "medium": 30, "large": 95}
    assert jain(list(shares(dict.fromkeys(tokens, 1.0), tokens, slowness=slowness).values())) >= 0.95


def test_a_tenant_of_twice_the_weight_gets_twice_the_time() -> None:
    used = shares({"one": 1.0, "two": 2.0}, {"one": 20, "two": 20})
    assert used["two"] / used["one"] == pytest.approx(2, rel=0.05)


def test_tenants_share_the_time_of_their_class_by_their_weights() -> None:
    weights = {"one": 1.0, "two": 2.0, "trainer": 1.0, "other trainer": 3.0}
    tokens = dict.fromkeys(weights, 20)
    used = shares(weights, tokens, batches=3000, decoding=frozenset({"one", "two"}), decode_share=0.3)
    assert (used["one"] + used["two"]) / sum(used.values()) == pytest.approx(0.3, rel=0.01)
    assert used["two"] / used["one"] == pytest.approx(2, rel=0.05)
    assert used["other trainer"] / used["trainer"] == pytest.approx(3, rel=0.05)


@settings(max_examples=50)
@given(
    st.floats(0.02, 0.98),
    st.lists(st.tuples(st.sampled_from([None, "x"]), st.floats(0.001, 1), st.floats(0.001, 1)), min_size=2),
)
def test_while_both_classes_wait_their_times_have_the_set_ratio_within_one_pass(
    share: float, passes: list[tuple[str | None, float, float]]
) -> None:
    """Passes that share, or do not, and take another time than was expected."""
    scheduler = Scheduler(max_batch_tokens=BUDGET, decode_share=share)
    shares_of = {Kind.DECODE: share, Kind.FORWARD: 1 - share}
    used, longest = dict.fromkeys(shares_of, 0.0), dict.fromkeys(shares_of, 0.0)
    drawn = cycle(passes)

    def add(kind: Kind, tenant: object) -> None:
        merge_key, expected, _ = next(drawn)
        scheduler.add(Job(next(keys), tenant, kind, 1, merge_key, expected, 1e9), 0.0)

    for kind in shares_of:
        for tenant in "ab":
            add(kind, tenant), add(kind, tenant)
    for _ in range(60):
        batch = scheduler.take_batch(0.0)
        kind = batch[0].kind
        for one in batch:
            add(kind, one.tenant)
        _, _, seconds = next(drawn)
        scheduler.charge(batch, seconds, 0.0)
        used[kind] += seconds
        longest[kind] = max(longest[kind], seconds)
        decoding, training = (used[each] / part for each, part in shares_of.items())
        one_pass = max(longest[each] / part for each, part in shares_of.items())
        assert abs(decoding - training) <= one_pass * (1 + 1e-9)


@pytest.mark.parametrize(("busy", "idle"), [(Kind.DECODE, Kind.BACKWARD), (Kind.FORWARD, Kind.DECODE)])
def test_a_class_alone_has_every_pass_and_owes_none_to_the_one_that_was_idle(busy: Kind, idle: Kind) -> None:
    scheduler = scheduler_with([job(kind=busy, merge_key=None) for _ in range(300)])
    for _ in range(200):
        batch = scheduler.take_batch(0.0)
        assert [one.kind for one in batch] == [busy]
        scheduler.charge(batch, 0.1, 0.0)
    for _ in range(50):
        scheduler.add(job(kind=idle, merge_key=None), 0.0)
    served = []
    for _ in range(20):
        batch = scheduler.take_batch(0.0)
        scheduler.charge(batch, 0.1, 0.0)
        served += [one.kind for one in batch]
    assert 9 <= served.count(busy) <= 11


@pytest.mark.parametrize("kind", [Kind.DECODE, Kind.FORWARD])
def test_nothing_is_delayed_to_merge_while_the_other_class_has_work(kind: Kind) -> None:
    cost = PassCost(0.1, 0.001)
    scheduler = Scheduler(max_batch_tokens=BUDGET, costs=Costs(cost, cost, cost, saved_by_shared_decode_seconds=0.1))
    for turn in range(10):  # it learns that "b" comes 0.01 s after its answer
        scheduler.add(job("b", kind=kind), float(turn))
        scheduler.charge(scheduler.take_batch(float(turn)), 0.1, turn + 0.99)
    scheduler.add(job("a", kind=kind), 10.0)
    assert scheduler.take_batch(10.0) == [] and scheduler.waits_until is not None
    (other,) = {Kind.DECODE, Kind.FORWARD} - {kind}
    scheduler.add(job("c", kind=other), 10.0)
    taken = [scheduler.take_batch(10.0), scheduler.take_batch(10.0)]
    assert [one.kind for batch in taken for one in batch] == [Kind.DECODE, Kind.FORWARD][: 1 + (kind is Kind.DECODE)]


@given(st.floats(0.02, 0.98), st.sampled_from([Kind.DECODE, Kind.BACKWARD]), st.integers(1, 5))
def test_no_class_starves_beside_a_flood_of_the_other(share: float, kind: Kind, number: int) -> None:
    flood, part = (Kind.FORWARD, share) if kind is Kind.DECODE else (Kind.DECODE, 1 - share)
    scheduler = Scheduler(max_batch_tokens=BUDGET, decode_share=share)
    mice = [job("mouse", kind=kind, merge_key=None) for _ in range(number)]
    taken: list[Job] = []
    for turn in range(10 + number + ceil((number - 1) * (1 - part) / part) + 1):
        if turn == 10:
            for mouse in mice:
                scheduler.add(mouse, 0.0)
        scheduler.add(job("flood", kind=flood, merge_key=None), 0.0)
        taken += (batch := scheduler.take_batch(0.0))
        scheduler.charge(batch, 0.1, 0.0)
    assert set(mice) <= set(taken)


def test_a_tenant_that_comes_back_cannot_spend_what_it_did_not_use() -> None:
    scheduler = scheduler_with([job("busy", merge_key=None) for _ in range(300)])
    scheduler.add(job("idle", merge_key=None), 0.0)
    for _ in range(200):
        scheduler.charge(scheduler.take_batch(0.0), 0.1, 0.0)
    for _ in range(50):
        scheduler.add(job("idle", merge_key=None), 0.0)
    served = [scheduler.take_batch(0.0)[0].tenant for _ in range(20)]
    assert 8 <= served.count("busy") <= 12


def test_a_tenant_that_has_waited_too_long_is_served_whatever_the_counters_say() -> None:
    scheduler = Scheduler(max_batch_tokens=BUDGET, max_wait_seconds=10)
    scheduler.add(job("used a lot", merge_key=None), 0.0)
    scheduler.charge(scheduler.take_batch(0.0), 1000.0, 0.0)
    scheduler.add(job("new", merge_key=None), 0.0)
    old = job("used a lot", merge_key=None)
    scheduler.add(old, 0.0)
    for now in range(1, 10):
        scheduler.add(job(f"new {now}", merge_key=None), float(now))
        assert old not in scheduler.take_batch(float(now))
    served = []
    for now in range(10, 10 + AGED_BATCH_EVERY):
        scheduler.add(job(f"new {now}", merge_key=None), float(now))
        served += scheduler.take_batch(float(now))
    assert old in served


def test_under_overload_when_everybody_waits_long_fairness_still_rules() -> None:
    """A flood must not earn priority by ageing behind itself."""
    scheduler = Scheduler(max_batch_tokens=BUDGET, max_wait_seconds=1)
    for _ in range(200):
        scheduler.add(job("flood", merge_key=None), 0.0)
    now, waited = 100.0, []
    for turn in range(20):
        single = job("mouse", merge_key=None)
        scheduler.add(single, now)
        batches = 0
        while True:
            now, batches = now + 5.0, batches + 1
            batch = scheduler.take_batch(now)
            scheduler.charge(batch, 5.0, now)
            if single in batch:
                break
        waited.append(batches)
        assert batches <= 3, f"turn {turn}: {waited}"
    assert sum(waited) <= 2.2 * len(waited)


def test_a_tenant_that_is_forgotten_leaves_nothing_behind() -> None:
    scheduler = scheduler_with([job("a"), job("b")])
    batches = drained(scheduler)
    scheduler.forget_tenant("a")
    scheduler.charge(batches[0], 1.0, 0.0)
    assert drained(scheduler) == []
