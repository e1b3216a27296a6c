"""Trainer of `zsl-train`: Hugging Face `Trainer` with metrics, progress lines and atomic checkpoints."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from zsl.client.remote import RemoteTrunk
from zsl.errors import ConfigError, RunFailed
from zsl.split.peft_model import active_adapter
from zsl.training.config.config import TrainerExtras
from zsl.training.directory.checkpoints import step_of
from zsl.training.directory.resume import RunDirectory, Start
from zsl.training.report.metrics import RunMetrics
from zsl.training.report.screen import epoch_summary, step_line, stopped_early, validation_line
from zsl.training.report.step_measure import StepMeasure
from zsl.training.trainer.overlap_mixin import OverlapMixin
from zsl.training.trainer.sample import SampleCallback
from zsl.training.trainer.step_times import StepTimes
from zsl.training.trainer.validation_loss import TokenLossMixin
from zsl.training.trainer.whole_checkpoints import WholeCheckpointsMixin, write_error

logger = logging.getLogger(__name__)


class SplitTrainer(OverlapMixin, TokenLossMixin, WholeCheckpointsMixin, Trainer):
    """`Trainer` that reports losses to `metrics`, and first steps and checkpoints to `directory`.

    `start` is the checkpoint of a resumed run. `extras` are the keys of `[train]` that `TrainingArguments` lacks, and
    `sample` reports a text where its `sample_prompt` asks for one.
    Raises `ConfigError`.
    """

    def __init__(
        self,
        *,
        metrics: RunMetrics,
        directory: RunDirectory,
        extras: TrainerExtras,
        trunk: RemoteTrunk,
        start: Start | None = None,
        sample: SampleCallback | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(overlap=extras.overlap, metrics=metrics, directory=directory, start=start, **arguments)
        self._times = StepTimes(self.model, trunk, parts=extras.overlap == 1)  # type: ignore[arg-type]
        self._skips = start is not None  # the first fetch skips the rows of earlier processes
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self._show = _Progress(metrics, directory, self._times, extras)
        self.add_callback(self._show)
        if sample is not None:
            self.add_callback(sample)
        if extras.early_stopping_patience is not None:
            early = EarlyStoppingCallback(extras.early_stopping_patience, extras.early_stopping_threshold)
            early.early_stopping_patience_counter = start.validations_without_gain if start else 0
            self.add_callback(early)

    @property
    def measured(self) -> StepMeasure:
        """The sum of the measurements of all steps of this process."""
        return self._show.measured

    @property
    def kept_step(self) -> int | None:
        """The step whose adapters were loaded at the end as the best, or None."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return step_of(Path(best)) if best and Path(best).is_dir() else None

    def prepare(self) -> None:
        """Make the data loader and the optimizer, to raise their errors early. Raises `ConfigError` for no steps."""
        loader = self.get_train_dataloader()
        if isinstance(self.train_dataset, Dataset) and not len(loader):
            raise ConfigError(
                f"no training step: {len(self.train_dataset)} rows do not fill a batch of "
                f"{self.args.train_batch_size}, and train.dataloader_drop_last drops smaller ones"
            )
        self.create_optimizer()

    def end_at(self, start: Start) -> None:
        """Load the final adapters of a training that has taken all its steps; `train` would take one more."""
        keeps_the_best = self.args.load_best_model_at_end and start.best is not None and start.best.is_dir()
        checkpoint = start.best if keeps_the_best else start.checkpoint
        self.state = TrainerState.load_from_json(str(start.checkpoint / "trainer_state.json"))
        self.state.best_model_checkpoint = str(checkpoint) if keeps_the_best else None
        model: Any = self.model
        model.load_adapter(str(checkpoint), active_adapter(model), is_trainable=True)

    def close_progress_bar(self) -> None:
        """End the bar's line, so that an error is printed on a line of its own."""
        if self._show.training_bar is not None:
            self._show.training_bar.close()

    def get_batch_samples(self, *arguments: Any) -> Any:
        with self._times.fetch():
            batches, items = super().get_batch_samples(*arguments)
        if not batches or self._skips:
            self._times.drop()  # no rows left, or skipped rows of earlier steps
        self._skips = False
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        with self._times.micro_batch(_real_tokens(inputs)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._metrics.add_micro_batch(loss.detach())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        elif "loss" in logs:
            logs.update(self._show.since_last_log.as_log())
        super().log(logs, start_time)


def perplexity(loss: float) -> float:
    """Return e to the loss (in nats per token); infinity on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _real_tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


class _Progress(ProgressCallback):
    """Progress bar of transformers, with a line for each logging step, validation and epoch."""

    def __init__(self, metrics: RunMetrics, directory: RunDirectory, times: StepTimes, extras: TrainerExtras) -> None:
        super().__init__()
        self._times = times
        self.measured = self.since_last_log = StepMeasure()
        self._patience, self._threshold = extras.early_stopping_patience, extras.early_stopping_threshold
        self._metrics = metrics
        self._directory = directory

    @staticmethod
    def _draws_bar(args: TrainingArguments) -> bool:
        return not args.disable_tqdm and sys.stderr.isatty()  # a log file needs only the lines

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        try:
            self._directory.begin()
        except OSError as error:
            logger.warning("%s cannot be written: %s; the training goes on", self._directory.path, write_error(error))
        measure = self._times.end_step()
        self.measured += measure
        self.since_last_log += measure
        self._metrics.end_step(state.global_step, float(state.epoch or 0), measure.as_line())
        if self._draws_bar(args):
            super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.fp16:  # there the gradient scaler skips such steps
            self._check_finite(state.global_step + 1, kwargs["model"])

    def _check_finite(self, step: int, model: nn.Module) -> None:
        """Raise `RunFailed` for a loss or gradient that is not finite, before the optimizer's step."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        named = {"loss": self._metrics.loss_until_now, "gradient": float(nn.utils.get_total_norm(gradients))}
        for name, value in named.items():
            if not math.isfinite(value):
                raise RunFailed(f"the {name} of step {step} is {value}: try a lower train.learning_rate")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The state of a checkpoint holds the intervals of the earlier process.
        state.compute_steps(args, state.max_steps)
        if self._draws_bar(args):
            super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
            bar: Any = self.training_bar
            bar.initial = bar.n = self.current_step = state.global_step
            bar.refresh()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._draws_bar(args):
            super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self._patience is not None and state.global_step < state.max_steps:
            line = stopped_early(
                state.global_step,
                state.max_steps,
                self._patience,
                state.best_metric,
                threshold=self._threshold,
                went_by=str(args.metric_for_best_model).removeprefix("eval_"),
            )
            tqdm.write(line)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            left = (state.max_steps - state.global_step) * self.measured.seconds / self.measured.steps
            tqdm.write(step_line(state.global_step, state.max_steps, float(logs["loss"]), self.since_last_log, left))
            self.since_last_log = StepMeasure()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = self._metrics.end_epoch()
        if losses:
            tqdm.write(epoch_summary(math.ceil(state.epoch or 0), losses))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        loss, of_tokens = metrics["eval_loss"], metrics["eval_perplexity"]
        self._metrics.add_validation(state.global_step, float(state.epoch or 0), loss, of_tokens)
        tqdm.write(validation_line(state.global_step, state.max_steps, loss, of_tokens))
        if self._draws_bar(args):
            super().on_evaluate(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_prediction_step(self, args: TrainingArguments, *arguments: Any, **kwargs: Any) -> None:
        if self._draws_bar(args):
            super().on_prediction_step(args, *arguments, **kwargs)  # type: ignore[no-untyped-call]
