"""A pass waits a moment for company that is worth it, and never longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from zsl.trunk.costs import UNKNOWN_COSTS, Costs, PassCost
from zsl.trunk.scheduling.anticipation import LATE_SHARE, Anticipation
from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.scheduling.scheduler import Scheduler
from zsl.trunk.work import Kind

FIXED_SECONDS = 0.04
ONE_WAY = PassCost(FIXED_SECONDS, 0.0002)
COSTS = Costs(ONE_WAY, ONE_WAY, ONE_WAY)
TOKENS, BUDGET = 16, 256


@dataclass(frozen=True)
class Ran:
    """A pass: for how long the device stood still though something was queued, and whose jobs it had."""

    began: float
    waited_seconds: float
    tenants: tuple[int, ...]


class Loop:
    """Clients that go forward, pause, backward, pause, on a virtual clock. `pause(tenant, its requests so far)` gives
    seconds, or None if nothing comes any more."""

    def __init__(
        self,
        clients: int,
        pause: Callable[[int, int], float | None],
        *,
        costs: Costs = COSTS,
        merge_key: object = "x",
        begins: Sequence[float] = (),
        kinds: Sequence[Kind] = (Kind.FORWARD, Kind.BACKWARD),
        slowness: float = 1.0,
    ) -> None:
        self.scheduler = Scheduler(max_batch_tokens=BUDGET, costs=costs)
        self._pause = pause
        self._merge_key = merge_key
        self._kinds = kinds
        self._slowness = slowness
        self._now = 0.0
        self._keys = count()
        self._requests = [0] * clients
        self._coming: list[tuple[float, int]] = []
        for tenant in range(clients):
            heappush(self._coming, (begins[tenant] if begins else 0.03 * tenant, tenant))  # out of step

    def run(self, passes: int) -> list[Ran]:
        """The next so many passes, or fewer if nothing comes any more."""
        ran: list[Ran] = []
        stands_since: float | None = None
        while len(ran) < passes:
            self._arrive()
            batch = self.scheduler.take_batch(self._now)
            if batch:
                waited = 0.0 if stands_since is None else self._now - stands_since
                ran.append(Ran(self._now, waited, tuple(int(str(job.tenant)) for job in batch)))
                stands_since = None
                self._compute(batch)
                continue
            if len(self.scheduler) and stands_since is None:
                stands_since = self._now
            times = [at for at, _ in self._coming[:1]]
            if self.scheduler.waits_until is not None:
                assert self.scheduler.waits_until > self._now
                times.append(self.scheduler.waits_until)
            if not times:
                assert not len(self.scheduler), "what is queued is never taken"
                break
            self._now = min(times)
        return ran

    def _arrive(self) -> None:
        while self._coming and self._coming[0][0] <= self._now:
            at, tenant = heappop(self._coming)
            kind = self._kinds[self._requests[tenant] % len(self._kinds)]
            self._requests[tenant] += 1
            cost = ONE_WAY.seconds(TOKENS)
            self.scheduler.add(Job(next(self._keys), tenant, kind, TOKENS, self._merge_key, cost, 1e9), at)

    def _compute(self, batch: list[Job]) -> None:
        seconds = self._slowness * ONE_WAY.seconds(sum(job.tokens for job in batch))
        self._now += seconds
        self._arrive()
        self.scheduler.charge(batch, seconds, self._now)
        for job in batch:
            tenant = int(str(job.tenant))
            pause = self._pause(tenant, self._requests[tenant])
            if pause is not None:
                heappush(self._coming, (self._now + pause, tenant))


def steadily(seconds: float) -> Callable[[int, int], float]:
    return lambda tenant, requests: seconds * (1 + 0.1 * tenant)


def test_clients_that_are_out_of_step_come_into_step_and_share_every_pass() -> None:
    for clients in (2, 4, 8):
        loop = Loop(clients, steadily(0.005))
        loop.run(100)
        assert {len(one.tenants) for one in loop.run(50)} == {clients}
    apart = Loop(2, steadily(0.005), costs=UNKNOWN_COSTS).run(150)
    assert {len(one.tenants) for one in apart} == {1}, "they met without waiting: the test would show nothing"


def test_many_clients_come_into_step_though_the_last_takes_longer_than_one_of_them_saves() -> None:
    loop = Loop(8, lambda tenant, requests: 0.01 + 0.012 * tenant)
    loop.run(100)
    assert {len(one.tenants) for one in loop.run(50)} == {8}


def test_passes_that_take_longer_than_was_measured_are_worth_longer_waits() -> None:
    pause = steadily(1.4 * FIXED_SECONDS)
    slow = Loop(2, pause, slowness=2.0)
    slow.run(100)
    assert {len(one.tenants) for one in slow.run(50)} == {2}
    assert {one.waited_seconds for one in Loop(2, pause).run(100)} == {0.0}


def test_decode_steps_are_waited_for_by_the_time_that_they_save() -> None:
    def passes(saved_seconds: float) -> list[Ran]:
        costs = replace(COSTS, saved_by_shared_decode_seconds=saved_seconds)
        return Loop(2, steadily(0.005), costs=costs, kinds=[Kind.DECODE]).run(100)[50:]

    assert {len(one.tenants) for one in passes(FIXED_SECONDS)} == {2}
    assert {one.waited_seconds for one in passes(0.0)} == {0.0}


def test_a_client_of_any_pauses_is_waited_for_beyond_their_mean_by_what_it_saves_at_most() -> None:
    anticipation = Anticipation(COSTS)
    for turn in range(100):
        anticipation.answered("b", Kind.FORWARD, float(turn))
        anticipation.arrived("b", Kind.FORWARD, "x", TOKENS, turn + (0.0, 0.06)[turn % 2])
    anticipation.answered("b", Kind.FORWARD, 100.0)
    until = anticipation.worth_waiting_until(
        Kind.FORWARD, "x", 100.0, jobs=9, tokens=9 * TOKENS, room_tokens=BUDGET, since=100.0
    )
    assert until is not None and 100.03 < until <= 100.04 + FIXED_SECONDS


def test_a_lone_client_is_never_kept_waiting() -> None:
    assert all(one.waited_seconds == 0 for one in Loop(1, steadily(0.001)).run(100))


def test_nobody_waits_for_clients_that_take_longer_than_company_saves() -> None:
    assert all(one.waited_seconds == 0 for one in Loop(2, steadily(2 * FIXED_SECONDS)).run(100))


def test_requests_that_run_alone_do_not_wait() -> None:
    assert all(one.waited_seconds == 0 for one in Loop(2, steadily(0.001), merge_key=None).run(100))


def test_a_client_that_stays_away_is_waited_for_once() -> None:
    loop = Loop(2, lambda tenant, requests: None if tenant and requests > 60 else 0.005)
    ran = loop.run(200)
    without = [one for one in ran if one.tenants == (0,)][20:]  # a few more from before they were in step
    assert len(without) > 50
    assert sum(one.waited_seconds > 0 for one in without) <= 1


def test_a_steady_client_that_is_late_by_less_than_it_would_cost_to_part_stays_in_step() -> None:
    """Its estimate has hardly any deviation, so that by this alone it would be given up at once."""
    late = LATE_SHARE * FIXED_SECONDS * 0.8
    loop = Loop(2, lambda tenant, requests: 0.005 + (late if tenant and requests % 40 == 0 else 0.0))
    loop.run(100)
    ran = loop.run(100)
    assert {len(one.tenants) for one in ran} == {2}
    assert sum(one.waited_seconds > late / 2 for one in ran) > 1


def test_a_client_that_has_left_is_not_waited_for() -> None:
    def pause(tenant: int, requests: int) -> float | None:
        if tenant and requests > 60:
            loop.scheduler.forget_tenant(tenant)
            return None
        return 0.005

    loop = Loop(2, pause)
    ran = loop.run(200)
    last = max(index for index, one in enumerate(ran) if 1 in one.tenants)
    assert len(ran[last].tenants) == 2 and last < 150
    assert all(one.waited_seconds == 0 for one in ran[last + 1 :])


@given(
    st.lists(st.lists(st.floats(0, 0.2), min_size=1, max_size=5), min_size=1, max_size=20),
    st.floats(0, 0.1),
)
def test_no_pass_waits_longer_than_company_can_save_and_everything_is_served(
    pauses: list[list[float]], apart: float
) -> None:
    loop = Loop(
        len(pauses),
        lambda tenant, requests: pauses[tenant][requests % len(pauses[tenant])] if requests < 20 else None,
        begins=[apart * tenant for tenant in range(len(pauses))],
    )
    ran = loop.run(10_000)
    assert max(one.waited_seconds for one in ran) <= (len(pauses) - 1) * FIXED_SECONDS + 1e-9
    assert sum(len(one.tenants) for one in ran) == 20 * len(pauses)
