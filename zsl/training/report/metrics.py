"""Losses of steps and validations of a run, and its samples, in memory and in `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from zsl.files.durable import write_file

logger = logging.getLogger(__name__)

_LOSSES = ("loss", "eval_loss", "eval_perplexity")


class RunMetrics:
    """Losses in full precision, each with a line in `file`; `earlier` has the lines up to a resumed run's checkpoint.

    The file is replaced at the first line, so a run without a step leaves it unchanged. While it cannot be written (a
    full disk), lines are kept in memory.
    """

    def __init__(self, file: Path, earlier: str = "") -> None:
        self._file = file
        self._open: BinaryIO | None = None
        self._lines = earlier.splitlines(keepends=True)
        self._written = 0  # number of lines in the file
        self._cannot_write = False
        self._micro_batches: list[torch.Tensor] = []
        lines = [_with_numbers(json.loads(line)) for line in self._lines]
        steps = [line for line in lines if "loss" in line]
        self.taken = 0  # steps of this process
        self.steps: list[tuple[int, float]] = [(line["step"], line["loss"]) for line in steps]
        self.validations: list[tuple[int, float]] = [
            (line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line
        ]
        # Losses of the epoch that the checkpoint interrupted.
        epochs_done = math.floor(steps[-1]["epoch"]) if steps else 0
        self._epoch: list[float] = [step["loss"] for step in steps if step["epoch"] > epochs_done]

    @property
    def losses(self) -> list[float]:
        """Losses of all steps of the run."""
        return [loss for _, loss in self.steps]

    @property
    def last_step(self) -> int:
        return self.steps[-1][0] if self.steps else 0

    @property
    def text(self) -> str:
        """All lines of the run so far."""
        return "".join(self._lines)

    def add_micro_batch(self, loss: torch.Tensor) -> None:
        self._micro_batches.append(loss)

    @property
    def loss_until_now(self) -> float:
        """Sum of the losses of the micro-batches since the last step."""
        return float(sum(self._micro_batches))

    def end_step(self, step: int, epoch: float, measured: Mapping[str, Any]) -> None:
        """Add a step of the micro-batches since the last one, with further `measured` values for its line."""
        loss = self.loss_until_now
        self._micro_batches.clear()
        self.steps.append((step, loss))
        self._epoch.append(loss)
        self.taken += 1
        self._add({"step": step, "loss": loss, "epoch": epoch, **measured})

    def add_validation(self, step: int, epoch: float, loss: float, perplexity: float) -> None:
        self.validations.append((step, loss))
        self._add({"step": step, "eval_loss": loss, "eval_perplexity": perplexity, "epoch": epoch})

    def add_sample(self, step: int, epoch: float, text: str) -> None:
        self._add({"step": step, "sample": text, "epoch": epoch})

    def end_epoch(self) -> list[float]:
        """Return the losses of the epoch's steps, and begin a new epoch."""
        losses, self._epoch = self._epoch, []
        return losses

    def finish(self) -> None:
        """Write all lines and sync them to disk. Raises `OSError`."""
        if self._lines:
            self._write()
        if self._open is not None:
            os.fsync(self._open.fileno())

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _add(self, line: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(without_nan(line), allow_nan=False) + "\n")
        if not self.taken:
            return  # a validation before the first step: the file may be another run's
        try:
            self._write()
        except OSError as error:
            if not self._cannot_write:
                logger.warning("%s cannot be written for now: %s; the training goes on", self._file, error.strerror)
            self._cannot_write = True
        else:
            self._cannot_write = False

    def _write(self) -> None:
        if self._open is None:
            # Replace the whole file, so that it never mixes in lines of another run or a partial line.
            write_file(self._file, self.text.encode())
            self._open = self._file.open("ab", buffering=0)
        else:
            rest = memoryview("".join(self._lines[self._written :]).encode())
            try:
                while rest:
                    rest = rest[self._open.write(rest) :]
            except OSError:
                self.close()
                raise
        self._written = len(self._lines)


def without_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }


def _with_numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None and name in _LOSSES else value for name, value in line.items()}
