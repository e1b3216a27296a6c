"""The scheduler: every job runs once, in fair order, and merges only what may be merged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zsl.trunk.scheduler import Job, Scheduler

jobs = st.lists(
    st.builds(
        Job,
        key=st.uuids(),
        tokens=st.integers(1, 100),
        merge_key=st.sampled_from([None, "a", "b"]),
        deadline=st.floats(0, 10),
    ),
    max_size=40,
)


def drained(scheduler: Scheduler) -> list[list[Job]]:
    batches = []
    while batch := scheduler.take_batch():
        batches.append(batch)
    return batches


def filled(queued: list[Job], budget: int = 100) -> Scheduler:
    scheduler = Scheduler(max_batch_tokens=budget)
    for job in queued:
        scheduler.add(job)
    return scheduler


@given(jobs)
def test_every_job_is_taken_once(queued: list[Job]) -> None:
    taken = [job.key for batch in drained(filled(queued)) for job in batch]
    assert sorted(taken, key=str) == sorted((job.key for job in queued), key=str)


@given(jobs, st.integers(1, 200))
def test_a_batch_merges_only_equal_keys_within_the_budget(queued: list[Job], budget: int) -> None:
    for batch in drained(filled(queued, budget)):
        if len(batch) > 1:
            assert len({job.merge_key for job in batch}) == 1
            assert batch[0].merge_key is not None
            assert sum(job.tokens for job in batch) <= budget


@given(jobs)
def test_the_oldest_job_is_always_in_the_next_batch(queued: list[Job]) -> None:
    """So nobody waits for ever: a job has at most as many batches before it as jobs came before it."""
    scheduler, left = filled(queued), list(queued)
    while batch := scheduler.take_batch():
        assert batch[0] is left[0]
        left = [job for job in left if job not in batch]


@given(jobs, st.floats(0, 10))
def test_expired_jobs_leave_and_the_others_stay(queued: list[Job], now: float) -> None:
    scheduler = filled(queued)
    expired = scheduler.take_expired(now)
    assert all(job.deadline <= now for job in expired)
    assert all(job.deadline > now for batch in drained(scheduler) for job in batch)
    assert len(expired) == sum(job.deadline <= now for job in queued)


def test_small_jobs_of_one_shape_share_a_pass() -> None:
    queued = [Job(key, 10, "forward 10", 1.0) for key in range(5)]
    assert [len(batch) for batch in drained(filled(queued, budget=30))] == [3, 2]


def test_a_job_larger_than_the_budget_runs_alone() -> None:
    queued = [Job("large", 500, "x", 1.0), Job("small", 1, "x", 1.0)]
    assert [[job.key for job in batch] for batch in drained(filled(queued))] == [["large"], ["small"]]


def test_a_discarded_job_is_not_taken() -> None:
    scheduler = filled([Job("a", 1, None, 1.0)])
    assert scheduler.discard("a")
    assert not scheduler.discard("a")
    assert scheduler.take_batch() == []


def test_a_job_queued_twice_runs_once() -> None:
    assert len(drained(filled([Job("a", 1, None, 1.0), Job("a", 1, None, 1.0)]))) == 1
