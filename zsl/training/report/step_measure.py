"""What a training step took, as numbers. Knows no clock and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

from zsl.link.traffic import Traffic


@dataclass(frozen=True, slots=True)
class StepMeasure:
    """What a step, or several of them, took.

    `crossing_seconds` is the time that the client waited for the trunk, there and back: `trunk_seconds` (for which the
    daemon says that it had the requests, queued or computed) and `wire_seconds`. `data_seconds` went to getting the
    rows, `other_seconds` to the optimizer.
    With micro-batches in flight together the client computes while it waits: the parts are not known (`parts_known`).
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    bottom_seconds: float = 0.0
    crossing_seconds: float = 0.0
    top_seconds: float = 0.0
    other_seconds: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    parts_known: bool = True

    def __add__(self, other: Self) -> Self:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return type(self)(**{**sums, "parts_known": self.parts_known and other.parts_known})

    @property
    def trunk_seconds(self) -> float:
        """Never more than the client waited: an answer that was computed again is counted for the last time only."""
        spent = self.traffic.queue_seconds + self.traffic.compute_seconds
        return min(spent, self.crossing_seconds) if self.parts_known else spent

    @property
    def wire_seconds(self) -> float:
        return self.crossing_seconds - self.trunk_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def part_seconds(self) -> dict[str, float]:
        """Seconds by part; they add up to those of the step. Empty where they are not known."""
        if not self.parts_known:
            return {}
        return {
            "data": self.data_seconds,
            "bottom": self.bottom_seconds,
            "wire": self.wire_seconds,
            "trunk": self.trunk_seconds,
            "top": self.top_seconds,
            "other": self.other_seconds,
        }

    def as_line(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        seconds = {f"{part}_seconds": round(value, 6) for part, value in self.part_seconds.items()}
        line = {"tokens": self.tokens, "seconds": round(self.seconds, 6), **seconds}
        line |= {"bytes_up": self.traffic.bytes_up, "bytes_down": self.traffic.bytes_down}
        return {**line, "replays": self.traffic.replays} if self.traffic.replays else line

    def as_log(self) -> dict[str, float]:
        """For `Trainer.log`, and so for TensorBoard."""
        shares = {f"share/{part}": value / self.seconds for part, value in self.part_seconds.items() if self.seconds}
        steps = max(self.steps, 1)
        return {
            "tokens_per_second": self.tokens_per_second,
            "trunk/bytes_up": self.traffic.bytes_up / steps,
            "trunk/bytes_down": self.traffic.bytes_down / steps,
            "trunk/queue_seconds": self.traffic.queue_seconds / steps,
            "trunk/compute_seconds": self.traffic.compute_seconds / steps,
            "trunk/replays": self.traffic.replays,
            **shares,
        }
