"""The order in which held steps are given up when memory runs short: the costliest first, of these the oldest. Pure."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from zsl.trunk.work import Keep

StepKey = tuple[bytes, int]  # session and step

_Place = tuple[int, int]  # how costly (0: the costliest), number of its arrival

_COSTLIEST_FIRST = {
    keep: rank for rank, keep in enumerate((Keep.GRAPH_AND_LINEAR_OUTPUTS, Keep.GRAPH, Keep.LINEAR_OUTPUTS, Keep.INPUT))
}
# Entries of steps that are gone stay in the heap until they are more than the others, and at least so many.
_STALE_ENTRIES = 64


class EvictionOrder:
    """Steps with the memory that each takes. Adding, removing and finding the first cost O(log n), amortized."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._steps: dict[StepKey, tuple[_Place, int]] = {}
        self._heap: list[tuple[_Place, StepKey]] = []

    def put(self, key: StepKey, keep: Keep, arrival: int, nbytes: int) -> None:
        """Add a step that is not there."""
        place = _COSTLIEST_FIRST[keep], arrival
        self._steps[key] = place, nbytes
        self.nbytes += nbytes
        heappush(self._heap, (place, key))

    def remove(self, key: StepKey) -> int:
        """Remove a step, and return the number of its arrival."""
        (_, arrival), nbytes = self._steps.pop(key)
        self.nbytes -= nbytes
        if not self._steps:
            self._heap.clear()
        elif len(self._heap) > 2 * len(self._steps) + _STALE_ENTRIES:
            self._heap = [(place, key) for key, (place, _) in self._steps.items()]
            heapify(self._heap)
        return arrival

    def first(self) -> StepKey:
        """Return the step to give up first; there must be one."""
        while True:
            place, key = self._heap[0]
            found = self._steps.get(key)
            if found is not None and found[0] == place:
                return key
            heappop(self._heap)
