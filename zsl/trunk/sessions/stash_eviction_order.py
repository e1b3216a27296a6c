"""Eviction order of held steps: the kind of stash that takes most memory first, then the oldest. Pure."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from zsl.trunk.work import Keep

StepKey = tuple[bytes, int]  # session and step

_Place = tuple[int, int]  # rank of its kind (0: evicted first), arrival number

_COSTLIEST_FIRST = {
    keep: rank for rank, keep in enumerate((Keep.GRAPH_AND_LINEAR_OUTPUTS, Keep.GRAPH, Keep.LINEAR_OUTPUTS, Keep.INPUT))
}
# Stale entries stay in the heap until they outnumber the valid ones, and are at least this many.
_STALE_ENTRIES = 64


class StashEvictionOrder:
    """Steps with their bytes, in eviction order. Each operation is O(log n), amortized."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.graph_nbytes = 0  # of steps that keep more than inputs
        self._graphs: dict[StepKey, int] = {}  # arrival numbers of those, mostly in order
        self._steps: dict[StepKey, tuple[_Place, int]] = {}
        self._heap: list[tuple[_Place, StepKey]] = []

    def put(self, key: StepKey, keep: Keep, arrival: int, nbytes: int) -> None:
        """Add a new step."""
        place = _COSTLIEST_FIRST[keep], arrival
        self._steps[key] = place, nbytes
        self.nbytes += nbytes
        if keep is not Keep.INPUT:
            self.graph_nbytes += nbytes
            self._graphs[key] = arrival
        heappush(self._heap, (place, key))

    def remove(self, key: StepKey) -> int:
        """Remove a step, and return its arrival number."""
        (_, arrival), nbytes = self._steps.pop(key)
        self.nbytes -= nbytes
        if self._graphs.pop(key, None) is not None:
            self.graph_nbytes -= nbytes
        if not self._steps:
            self._heap.clear()
        elif len(self._heap) > 2 * len(self._steps) + _STALE_ENTRIES:
            self._heap = [(place, key) for key, (place, _) in self._steps.items()]
            heapify(self._heap)
        return arrival

    def oldest_graph(self) -> tuple[StepKey, int] | None:
        """Return the oldest step that keeps more than inputs, and its arrival number."""
        return next(iter(self._graphs.items()), None)

    def first(self) -> StepKey:
        """Return the step to evict first. Not for an empty order."""
        while True:
            place, key = self._heap[0]
            found = self._steps.get(key)
            if found is not None and found[0] == place:
                return key
            heappop(self._heap)
