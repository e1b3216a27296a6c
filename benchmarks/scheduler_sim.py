"""Simulate the daemon's `Scheduler` under a virtual clock, against first come, first served.

The results are throughput, latency and fairness with 2 to 10,000 clients, and decisions per second. Only decisions per
second depend on this machine.

Three runs for each number of clients and each policy:

- mixed: a tenth of the clients are floods, which always have 8 large requests in flight; the others are mice, which
  compute between two small requests. Gives throughput, latencies, the size of batches and the decisions a second.
- equal: all always have requests waiting, each client of its own size. Gives Jain's index of the device time.
- single: all but one are floods, and now and then a new client sends one small request. Gives the largest number of
  batches that such a request waited for, its own included.

Costs and limits of batches are those that a daemon would find on that device. Nothing expires, no request is refused,
and messages take no time.

    python benchmarks/scheduler_sim.py                   a trunk of 26 SmolLM2 layers on 2 CPU cores
    python benchmarks/scheduler_sim.py --device fast     an accelerator
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Protocol

import click
from report import Report, out_option, percentile

from zsl.trunk.costs import Costs, PassCost, batch_limits
from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.scheduling.scheduler import Scheduler
from zsl.trunk.settings import ServerSettings
from zsl.trunk.work import Kind

CLIENTS = (2, 10, 100, 1_000, 10_000)
FLOOD_LANES, FLOOD_TOKENS = 8, (128, 512)
MOUSE_TOKENS, MOUSE_THINK_SECONDS = (12, 64), 0.1
SINGLE_BATCHES = 1_000
EQUAL_TOKENS, MIN_EQUAL_LANES = (16, 512), 4
# With more equal clients, one large request is much beside the share of a client in a run of bearable length.
MAX_EQUAL_CLIENTS = 1_000
DEADLINE_SECONDS = 300.0
SEED = 0

LEAST_DECISIONS_PER_SECOND, AT_CLIENTS = 50_000, 1_000
LEAST_JAIN = 0.95
MOST_BATCHES_OF_TWO_TENANTS = 2


def trunk_costs(fixed_seconds: float, seconds_per_token: float) -> Costs:
    """Forward and backward cost the same; from products a backward computes a fifth more, as `UNKNOWN_COSTS` has it."""
    one_way = PassCost(fixed_seconds, seconds_per_token)
    return Costs(one_way, one_way, PassCost(fixed_seconds, 1.2 * seconds_per_token))


DEVICES = {"cpu": trunk_costs(0.040, 0.0018), "fast": trunk_costs(0.001, 0.00001)}


# --- policies --------------------------------------------------------------------------------------------------------


class Policy(Protocol):
    """Interface of a scheduler in the simulation."""

    @property
    def waits_until(self) -> float | None: ...

    def add(self, job: Job, now: float) -> None: ...

    def take_batch(self, now: float) -> list[Job]: ...

    def charge(self, batch: list[Job], seconds: float, now: float) -> None: ...


class Fifo:
    """First come, first served. It merges as well as the real one: whatever can share the first job's pass does, in
    the order of arrival. It never waits."""

    waits_until = None

    def __init__(self, *, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._arrivals = count()
        self._queues: dict[tuple[object, ...], deque[tuple[int, Job]]] = defaultdict(deque)

    def add(self, job: Job, now: float) -> None:
        self._queues[job.kind, job.merge_key].append((next(self._arrivals), job))

    def take_batch(self, now: float) -> list[Job]:
        waiting = [queue for queue in self._queues.values() if queue]
        if not waiting:
            return []
        queue = min(waiting, key=lambda queue: queue[0][0])
        batch = [queue.popleft()[1]]
        tokens = batch[0].tokens
        while batch[0].merge_key is not None and queue and tokens + queue[0][1].tokens <= self._max_batch_tokens:
            batch.append(queue.popleft()[1])
            tokens += batch[-1].tokens
        return batch

    def charge(self, batch: list[Job], seconds: float, now: float) -> None:
        """Nobody's use counts."""


class Timed:
    """A policy, and the real seconds spent inside it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.seconds = 0.0

    @property
    def waits_until(self) -> float | None:
        return self._policy.waits_until

    def add(self, job: Job, now: float) -> None:
        began = time.perf_counter()
        self._policy.add(job, now)
        self.seconds += time.perf_counter() - began

    def take_batch(self, now: float) -> list[Job]:
        began = time.perf_counter()
        batch = self._policy.take_batch(now)
        self.seconds += time.perf_counter() - began
        return batch

    def charge(self, batch: list[Job], seconds: float, now: float) -> None:
        began = time.perf_counter()
        self._policy.charge(batch, seconds, now)
        self.seconds += time.perf_counter() - began


def make_policy(name: str, costs: Costs) -> Policy:
    """Build the daemon's scheduler, or the baseline."""
    max_batch_tokens = batch_limits(costs).max_batch_tokens
    if name == "fifo":
        return Fifo(max_batch_tokens=max_batch_tokens)
    return Scheduler(
        max_batch_tokens=max_batch_tokens,
        max_wait_seconds=ServerSettings().max_wait_seconds,
        costs=costs,
    )


POLICIES = ("fair", "fifo")


# --- the simulation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Behaviour:
    """A client has `lanes` lanes. Each goes forward, thinks, backward, thinks, and draws a size for the next step.

    `single`: each lane sends forwards only, each as a client that has never been here.
    """

    name: str
    lanes: int
    tokens: tuple[int, int]  # the least and the most
    think_seconds: float  # mean; 0: the next request follows the answer at once
    single: bool = False


FLOOD = Behaviour("flood", FLOOD_LANES, FLOOD_TOKENS, think_seconds=0.0)
MOUSE = Behaviour("mouse", 1, MOUSE_TOKENS, MOUSE_THINK_SECONDS)


@dataclass(slots=True, eq=False)
class Lane:
    """State of a client's lane."""

    behaviour: Behaviour
    tenant: bytes
    kind: Kind = Kind.BACKWARD  # of its last request; a forward comes next
    tokens: int = 0
    sent_at: float = 0.0
    sent_after_batches: int = 0
    taken_after_batches: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """A request with its answer. `waited_batches` counts the one that it was in."""

    behaviour: Behaviour
    tenant: bytes
    kind: Kind
    latency_seconds: float
    waited_batches: int
    device_seconds: float  # its share of the pass, by tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """Measurements after the warm-up."""

    answered: list[Answered]
    batches: int
    elapsed_seconds: float
    busy_seconds: float
    policy_seconds: float  # real ones

    def of(self, behaviour: Behaviour) -> list[Answered]:
        return [answered for answered in self.answered if answered.behaviour is behaviour]


class Simulation:
    """Clients, one device, and a policy between them."""

    def __init__(self, policy: Policy, costs: Costs, clients: Sequence[Behaviour]) -> None:
        self._policy = Timed(policy)
        self._costs = costs
        self._merge_below_tokens = batch_limits(costs).merge_below_tokens
        self._random = random.Random(SEED)
        self._ties = count()
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sent: dict[Hashable, Lane] = {}
        self._requests, self._tenants = count(), count()
        self._running: list[Job] = []
        self._running_seconds = 0.0
        self._lanes = [
            Lane(behaviour, tenant)
            for behaviour in clients
            for tenant in [self._new_tenant()]
            for _ in range(behaviour.lanes)
        ]
        self._batches = 0
        self._busy_seconds = 0.0
        self._answered: list[Answered] = []

    def run(self, batches: int) -> Outcome:
        """Run half the batches as warm-up, then the given number."""
        self._random.shuffle(self._lanes)
        for lane in self._lanes:
            self._send_later(lane)
        self._run_until(batches // 2)
        began, busy, policy = self._now, self._busy_seconds, self._policy.seconds
        self._answered.clear()
        self._run_until(batches // 2 + batches)
        return Outcome(
            answered=self._answered,
            batches=batches,
            elapsed_seconds=self._now - began,
            busy_seconds=self._busy_seconds - busy,
            policy_seconds=self._policy.seconds - policy,
        )

    def _run_until(self, batches: int) -> None:
        while self._batches < batches:
            self._now, _, event = heappop(self._events)
            event()
            self._dispatch()

    def _later(self, at: float, event: Callable[[], None]) -> None:
        heappush(self._events, (at, next(self._ties), event))

    def _new_tenant(self) -> bytes:
        return next(self._tenants).to_bytes(16, "big")  # as long as a session's id

    def _send_later(self, lane: Lane) -> None:
        think = lane.behaviour.think_seconds
        at = self._now + (self._random.expovariate(1 / think) if think else 0.0)
        self._later(at, partial(self._send, lane))

    def _send(self, lane: Lane) -> None:
        if lane.behaviour.single:
            lane.tenant = self._new_tenant()
        if lane.kind is Kind.BACKWARD or lane.behaviour.single:
            lane.kind, lane.tokens = Kind.FORWARD, self._random.randint(*lane.behaviour.tokens)
            cost = self._costs.forward
        else:
            lane.kind = Kind.BACKWARD
            cost = self._costs.backward
        lane.sent_at, lane.sent_after_batches = self._now, self._batches + bool(self._running)
        job = Job(
            key=(lane.tenant, next(self._requests)),
            tenant=lane.tenant,
            kind=lane.kind,
            tokens=lane.tokens,
            merge_key="packed" if lane.tokens <= self._merge_below_tokens else None,
            cost_seconds=cost.seconds(lane.tokens),
            deadline=self._now + DEADLINE_SECONDS,
        )
        self._sent[job.key] = lane
        self._policy.add(job, self._now)

    def _dispatch(self) -> None:
        """Start the next batch if the device is free."""
        if self._running:
            return
        self._running = self._policy.take_batch(self._now)
        if self._running:
            for job in self._running:
                self._sent[job.key].taken_after_batches = self._batches
            self._running_seconds = self._pass_seconds(self._running)
            self._later(self._now + self._running_seconds, self._end_pass)
        elif self._policy.waits_until is not None:
            self._later(self._policy.waits_until, self._dispatch)

    def _pass_seconds(self, batch: Sequence[Job]) -> float:
        if batch[0].kind is Kind.FORWARD:
            cost = self._costs.forward
        else:
            cost = self._costs.backward if len(batch) == 1 else self._costs.backward_from_linear_outputs
        return cost.seconds(sum(job.tokens for job in batch))

    def _end_pass(self) -> None:
        """As in the server: the device gets its next batch before this one is answered."""
        batch, seconds = self._running, self._running_seconds
        self._running = []
        self._batches += 1
        self._busy_seconds += seconds
        self._policy.charge(batch, seconds, self._now)
        self._dispatch()
        tokens = sum(job.tokens for job in batch)
        for job in batch:
            lane = self._sent.pop(job.key)
            self._answered.append(
                Answered(
                    behaviour=lane.behaviour,
                    tenant=lane.tenant,
                    kind=lane.kind,
                    latency_seconds=self._now - lane.sent_at,
                    waited_batches=lane.taken_after_batches - lane.sent_after_batches + 1,
                    device_seconds=seconds * job.tokens / tokens,
                )
            )
            self._send_later(lane)

    def longest_unanswered_batches(self, behaviour: Behaviour) -> int:
        """Return the number of batches that the oldest unanswered request of these clients has waited for."""
        waiting = [lane for lane in self._sent.values() if lane.behaviour is behaviour]
        return max((self._batches - lane.sent_after_batches for lane in waiting), default=0)


# --- the three runs --------------------------------------------------------------------------------------------------


def mixed(policy: str, costs: Costs, clients: int) -> dict[str, float]:
    """A tenth floods, the others mice."""
    floods = max(clients // 10, 1)
    simulation = Simulation(make_policy(policy, costs), costs, [FLOOD] * floods + [MOUSE] * (clients - floods))
    outcome = simulation.run(batches=max(5_000, clients))
    jobs = len(outcome.answered)
    return {
        "steps_per_s": sum(one.kind is Kind.BACKWARD for one in outcome.answered) / outcome.elapsed_seconds,
        "utilisation": outcome.busy_seconds / outcome.elapsed_seconds,
        **latencies("mouse", outcome.of(MOUSE)),
        **latencies("flood", outcome.of(FLOOD)),
        "jobs_a_batch": jobs / outcome.batches,
        "decisions_per_s": jobs / outcome.policy_seconds,
    }


def latencies(name: str, answered: Sequence[Answered]) -> dict[str, float]:
    """Median and 99th percentile, in virtual milliseconds."""
    milliseconds = [one.latency_seconds * 1e3 for one in answered]
    if not milliseconds:
        return {}  # none was served at all
    return {f"{name}_p{percent}_ms": percentile(milliseconds, percent) for percent in (50, 99)}


def jain_of_equals(policy: str, costs: Costs, clients: int) -> float:
    """Jain's index of the device time of clients that differ only in the size of their requests."""
    sizes = random.Random(SEED)
    least, most = map(math.log, EQUAL_TOKENS)
    tokens = [round(math.exp(sizes.uniform(least, most))) for _ in range(clients)]
    # So many that the smallest requests, half of them forwards, can fill twice an equal share of a merged pass.
    lanes = max(MIN_EQUAL_LANES, math.ceil(4 * batch_limits(costs).max_batch_tokens / (clients * EQUAL_TOKENS[0])))
    behaviours = [Behaviour("equal", lanes, (size, size), think_seconds=0.0) for size in tokens]
    outcome = Simulation(make_policy(policy, costs), costs, behaviours).run(batches=max(1_000, 4 * clients))
    used: defaultdict[bytes, float] = defaultdict(float)
    for one in outcome.answered:
        used[one.tenant] += one.device_seconds
    return jain([*used.values(), *[0.0] * (clients - len(used))])


def jain(values: Sequence[float]) -> float:
    """1 when all are equal, 1 / n when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def most_batches_of_a_single(policy: str, costs: Costs, clients: int) -> int:
    """A request that is not served by the end counts with what it has waited for by then."""
    # About one in ten batches, so that they do not meet each other.
    think_seconds = 10 * costs.forward.seconds(sum(FLOOD_TOKENS) // 2)
    single = Behaviour("single", 1, MOUSE_TOKENS, think_seconds, single=True)
    simulation = Simulation(make_policy(policy, costs), costs, [single] + [FLOOD] * (clients - 1))
    outcome = simulation.run(SINGLE_BATCHES)
    served = max((one.waited_batches for one in outcome.of(single)), default=0)
    return max(served, simulation.longest_unanswered_batches(single))


def note_aims(report: Report, rows: dict[tuple[int, str], dict[str, float]]) -> None:
    """Add notes to the report on the targets of the scheduler and their results."""

    def note(what: str, value: float, wanted: str, met: bool) -> None:
        report.note(f"{what}: {value:.3g}, wanted {wanted}: {'met' if met else 'missed'}")

    decisions = rows[AT_CLIENTS, "fair"]["decisions_per_s"]
    note(
        f"decisions a second at {AT_CLIENTS} clients",
        decisions,
        f"at least {LEAST_DECISIONS_PER_SECOND}",
        decisions >= LEAST_DECISIONS_PER_SECOND,
    )
    least_jain = min(row["jain"] for (_, policy), row in rows.items() if policy == "fair" and "jain" in row)
    note("the lowest Jain index", least_jain, f"at least {LEAST_JAIN}", least_jain >= LEAST_JAIN)
    wait = rows[2, "fair"]["single_batches"]
    note(
        "batches until a single request is served beside one flood",
        wait,
        f"at most {MOST_BATCHES_OF_TWO_TENANTS}",
        wait <= MOST_BATCHES_OF_TWO_TENANTS,
    )


@click.command()
@click.option("--device", type=click.Choice(list(DEVICES)), default="cpu", show_default=True, help="Simulated device.")
@out_option
def main(device: str, out: Path) -> None:
    """Simulate, print one table, write it and a plot."""
    costs = DEVICES[device]
    limits = batch_limits(costs)
    report = Report(
        f"scheduler_sim_{device}",
        f"The scheduler under a virtual clock: {costs.forward.fixed_seconds * 1e3:g} ms + "
        f"{costs.forward.seconds_per_token * 1e3:g} ms a token, requests of up to {limits.merge_below_tokens} tokens "
        f"share passes of {limits.max_batch_tokens}",
        out,
    )
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for clients in CLIENTS:
        for policy in POLICIES:
            row = mixed(policy, costs, clients)
            if clients <= MAX_EQUAL_CLIENTS:
                row["jain"] = jain_of_equals(policy, costs, clients)
            row["single_batches"] = most_batches_of_a_single(policy, costs, clients)
            rows[clients, policy] = row
            report.add(clients=clients, policy=policy, **row)
    report.note("Times are virtual, except decisions_per_s: requests over the real seconds inside the policy.")
    report.note(
        f"single_batches counts within a run of {SINGLE_BATCHES * 3 // 2}; where it comes near, the wait went on."
    )
    note_aims(report, rows)
    report.publish()
    report.plot_lines(
        "clients",
        "mouse_p99_ms",
        "policy",
        x_label="clients, a tenth of them floods",
        y_label="99th percentile of a mouse's latency (virtual ms)",
        log_x=True,
        log_y=True,
    )


if __name__ == "__main__":
    main()
