"""The loss of every optimizer step of a run, in memory and in `metrics.jsonl`. Knows no trainer."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import BinaryIO

import torch

from zsl.split.durable import write_file

logger = logging.getLogger(__name__)


class StepLosses:
    """The losses in full precision, and a line each in `file`; `earlier` are the lines until where a run goes on.

    The file begins anew with the first step, so a run that takes none leaves it as it is. While it cannot be written
    (a full disk), the lines wait in memory.
    """

    def __init__(self, file: Path, earlier: str = "") -> None:
        self._file = file
        self._open: BinaryIO | None = None
        self._lines = earlier.splitlines(keepends=True)
        self._written = 0  # of the lines, those in the file
        self._cannot_write = False
        self._micro_batches: list[torch.Tensor] = []
        steps = [json.loads(line) for line in self._lines]
        self.taken = 0  # steps of this process
        self.last_step: int = steps[-1]["step"] if steps else 0
        self.all: list[float] = [step["loss"] for step in steps]
        # Of the epoch that the earlier lines end in the middle of.
        epochs_done = math.floor(steps[-1]["epoch"]) if steps else 0
        self.epoch: list[float] = [step["loss"] for step in steps if step["epoch"] > epochs_done]

    @property
    def text(self) -> str:
        """All lines of the run until now."""
        return "".join(self._lines)

    def add_micro_batch(self, loss: torch.Tensor) -> None:
        self._micro_batches.append(loss)

    def end_step(self, step: int, epoch: float) -> None:
        loss = float(sum(self._micro_batches))
        self._micro_batches.clear()
        self.all.append(loss)
        self.epoch.append(loss)
        self.taken += 1
        self.last_step = step
        self._lines.append(json.dumps({"step": step, "loss": loss, "epoch": epoch}) + "\n")
        try:
            self._write()
        except OSError as error:
            if not self._cannot_write:
                logger.warning("%s cannot be written for now: %s; the training goes on", self._file, error.strerror)
            self._cannot_write = True
        else:
            self._cannot_write = False

    def end_epoch(self) -> list[float]:
        losses, self.epoch = self.epoch, []
        return losses

    def finish(self) -> None:
        """Have all lines on the disk. Raises `OSError`."""
        if self._lines:
            self._write()
        if self._open is not None:
            os.fsync(self._open.fileno())

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _write(self) -> None:
        if self._open is None:
            # All of them, aside: lines of another run, and half a line, are replaced and never mixed in.
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
