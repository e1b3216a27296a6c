"""Hugging Face `Trainer`, with each step's own loss kept and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from zsl.training.overlap import OverlapMixin
from zsl.training.report import epoch_summary


class StepLosses:
    """The loss of every optimizer step, in full precision: in memory, and a line each in a file."""

    def __init__(self, file: Path) -> None:
        """The file begins anew with the first step, so a run that takes none leaves it as it is."""
        self._file = file
        self._lines: TextIO | None = None
        self._micro_batches: list[torch.Tensor] = []
        self.all: list[float] = []
        self.epoch: list[float] = []

    def add_micro_batch(self, loss: torch.Tensor) -> None:
        self._micro_batches.append(loss)

    def end_step(self, step: int, **more: float | None) -> None:
        loss = float(sum(self._micro_batches))
        self._micro_batches.clear()
        self.all.append(loss)
        self.epoch.append(loss)
        if self._lines is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self._file.open("w" if step == 1 else "a", encoding="utf-8")
        self._lines.write(json.dumps({"step": step, "loss": loss, **more}) + "\n")
        self._lines.flush()

    def end_epoch(self) -> list[float]:
        losses, self.epoch = self.epoch, []
        return losses

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


class SplitTrainer(OverlapMixin, Trainer):
    """`Trainer` that tells `losses` of each micro-batch's share of its step's loss."""

    def __init__(self, *, losses: StepLosses, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._losses = losses
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self._show = _Show(losses)
        self.add_callback(self._show)

    def close_progress_bar(self) -> None:
        """End the bar's line, so that what is printed next stands on its own; needed after a failure."""
        if self._show.training_bar is not None:
            self._show.training_bar.close()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.add_micro_batch(loss.detach())
        return loss


class _Show(ProgressCallback):
    """The progress bar of transformers, with a line per logging step and per epoch."""

    def __init__(self, losses: StepLosses) -> None:
        super().__init__()
        self._losses = losses

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._losses.end_step(state.global_step, epoch=state.epoch)
        if not args.disable_tqdm:
            super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm:
            super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            rate = f", learning rate {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
            tqdm.write(f"  step {state.global_step}/{state.max_steps}: loss {float(logs['loss']):.4f}{rate}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = self._losses.end_epoch()
        if losses:
            tqdm.write(epoch_summary(math.ceil(state.epoch or 0), losses))
