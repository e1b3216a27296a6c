"""Measurements of training steps: seconds by part, tokens and traffic. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

from zsl.link.traffic import Traffic


@dataclass(frozen=True, slots=True)
class StepMeasure:
    """Measurements of one or more steps.

    `crossing_seconds` is the client's wait for the trunk: `trunk_seconds` (queueing and computing, as reported by the
    daemon) and `wire_seconds`. `data_seconds` is for loading the rows, `other_seconds` for the optimizer. With
    overlapping micro-batches the client computes while it waits, and the parts are unknown (`parts_known`).
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
        """Seconds in the daemon, at most `crossing_seconds`; of a replayed request, only the last computation's."""
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
        """Seconds by part, which add up to the step's; empty if unknown."""
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

    @property
    def _adapter_bytes(self) -> dict[str, int]:
        """Bytes of adapters on the trunk's layers and of their gradients, by name; empty without any."""
        up, down = self.traffic.adapter_bytes_up, self.traffic.adapter_bytes_down
        return {"adapter_bytes_up": up, "adapter_bytes_down": down} if up or down else {}

    def as_line(self) -> dict[str, Any]:
        """Return the values for a line of `metrics.jsonl`."""
        seconds = {f"{part}_seconds": round(value, 6) for part, value in self.part_seconds.items()}
        line = {"tokens": self.tokens, "seconds": round(self.seconds, 6), **seconds}
        line |= {"bytes_up": self.traffic.bytes_up, "bytes_down": self.traffic.bytes_down}
        line |= self._adapter_bytes
        return {**line, "replays": self.traffic.replays} if self.traffic.replays else line

    def as_log(self) -> dict[str, float]:
        """Return the values for `Trainer.log`, and so for TensorBoard."""
        shares = {f"share/{part}": value / self.seconds for part, value in self.part_seconds.items() if self.seconds}
        steps = max(self.steps, 1)
        return {
            "tokens_per_second": self.tokens_per_second,
            "trunk/bytes_up": self.traffic.bytes_up / steps,
            "trunk/bytes_down": self.traffic.bytes_down / steps,
            **{f"trunk/{name}": value / steps for name, value in self._adapter_bytes.items()},
            "trunk/queue_seconds": self.traffic.queue_seconds / steps,
            "trunk/compute_seconds": self.traffic.compute_seconds / steps,
            "trunk/replays": self.traffic.replays,
            **shares,
        }
