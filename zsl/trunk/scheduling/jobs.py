"""Jobs of the scheduler, and the table of their kinds: class, cost, and the time that a shared pass saves. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum

from zsl.trunk.costs import Costs, PassCost
from zsl.trunk.work import Kind


class WorkClass(Enum):
    """Classes of work, which share the device by a set ratio (`zsl.trunk.scheduling.scheduler`)."""

    DECODING = "decoding"
    TRAINING = "training"


@dataclass(frozen=True, slots=True)
class KindTraits:
    """Traits of a kind of jobs. `cost`: of a job alone. `saved_seconds`: time saved by each job that shares a pass."""

    work_class: WorkClass
    cost: Callable[[Costs], PassCost]
    saved_seconds: Callable[[Costs], float]


# Each kind has a queue of its own in a tenant. Those of one class stand in the order in which a tenant's jobs run:
# backwards end a step and free memory. Prompts and decode steps are one kind, so that they run in the order in which
# they came: neither the first token of a text waits for the rest of others, nor the other way round.
KINDS: dict[Kind, KindTraits] = {
    Kind.DECODE: KindTraits(
        WorkClass.DECODING, lambda costs: costs.forward, lambda costs: costs.saved_by_shared_decode_seconds
    ),
    Kind.BACKWARD: KindTraits(
        WorkClass.TRAINING,
        lambda costs: costs.backward,
        lambda costs: min(costs.backward.fixed_seconds, costs.backward_from_linear_outputs.fixed_seconds),
    ),
    Kind.FORWARD: KindTraits(
        WorkClass.TRAINING, lambda costs: costs.forward, lambda costs: costs.forward.fixed_seconds
    ),
}


@dataclass(frozen=True, slots=True)
class Job:
    """A queued request, as the scheduler sees it.

    `merge_key`: jobs of one kind with equal keys can share a pass; None runs alone. `cost_seconds`: its expected time,
    which `Scheduler.charge` corrects. `deadline`: seconds on the clock of `now`. `client`: its client within the
    tenant; None if the tenant is one client. `frees_graph`: it is the backward of a forward that kept more than inputs.
    """

    key: Hashable
    tenant: Hashable
    kind: Kind
    tokens: int  # rows x tokens
    merge_key: Hashable | None
    cost_seconds: float
    deadline: float
    client: Hashable = None
    frees_graph: bool = False

    @property
    def comes_from(self) -> Hashable:
        return self.tenant if self.client is None else self.client

    @property
    def work_class(self) -> WorkClass:
        return KINDS[self.kind].work_class
