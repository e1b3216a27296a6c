"""Hugging Face `Trainer`, with what each step took kept and shown, and checkpoints that are whole or not there."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
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
from transformers.trainer_callback import ExportableState

from zsl.client.remote import RemoteTrunk
from zsl.errors import ConfigError, RunFailed
from zsl.split.adapter import write_adapter
from zsl.split.durable import aside, reason
from zsl.split.peft_model import active_adapter
from zsl.split.reference import first_line
from zsl.training.checkpoints import prune, put_in_place, step_of
from zsl.training.config import TrainerExtras
from zsl.training.metrics import RunMetrics
from zsl.training.overlap import OverlapMixin
from zsl.training.report import epoch_summary, step_line, stopped_early, validation_line
from zsl.training.resume import RunDirectory, Start
from zsl.training.step_measure import StepMeasure
from zsl.training.step_times import StepTimes
from zsl.training.validation_loss import TokenLossMixin

logger = logging.getLogger(__name__)

_Best = tuple[float | None, int | None, str | None]  # validation loss, step, checkpoint


class SplitTrainer(OverlapMixin, TokenLossMixin, Trainer):
    """`Trainer` that tells `metrics` what each micro-batch adds to its step's loss, and `directory` of its checkpoints.

    `start` is where the run goes on that had processes before this one. `extras` are what `[train]` has beside
    `TrainingArguments`. Raises `ConfigError`.
    """

    def __init__(
        self,
        *,
        metrics: RunMetrics,
        directory: RunDirectory,
        extras: TrainerExtras,
        trunk: RemoteTrunk,
        base_model: str | None = None,
        start: Start | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(overlap=extras.overlap, **arguments)
        self._metrics = metrics
        self._directory = directory
        self._times = StepTimes(self.model, trunk, parts=extras.overlap == 1)  # type: ignore[arg-type]
        self._base_model = base_model
        self._began = time.monotonic() - (start.seconds if start else 0.0)
        self._of_another_run = start is not None and start.of_steps is None
        self._skips = start is not None  # the rows of earlier processes, with the first fetch
        self._aside: Path | None = None
        self._best_before: _Best = (None, None, None)
        # Trainer would remove checkpoints of others, and at the end those that a failure to save may still need.
        self._checkpoints_kept, self.args.save_total_limit = self.args.save_total_limit, None
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self._show = _Show(metrics, directory, self._times, extras)
        self.add_callback(self._show)
        if extras.early_stopping_patience is not None:
            early = EarlyStoppingCallback(extras.early_stopping_patience, extras.early_stopping_threshold)
            early.early_stopping_patience_counter = start.validations_without_gain if start else 0
            self.add_callback(early)

    @property
    def seconds(self) -> float:
        """Of training, in all processes that the run had."""
        return time.monotonic() - self._began

    @property
    def measured(self) -> StepMeasure:
        """All the steps that this process has taken."""
        return self._show.measured

    @property
    def kept_step(self) -> int | None:
        """The step whose adapters the model has, if the best were loaded at the end."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return step_of(Path(best)) if best and Path(best).is_dir() else None

    def prepare(self) -> None:
        """Make what `train` begins with, which shows whether it can. Raises `ConfigError` if it has no step."""
        loader = self.get_train_dataloader()
        if isinstance(self.train_dataset, Dataset) and not len(loader):
            raise ConfigError(
                f"there is no step to take: {len(self.train_dataset)} rows make no batch of "
                f"{self.args.train_batch_size}, and train.dataloader_drop_last leaves out what is less"
            )
        self.create_optimizer()

    def end_at(self, start: Start) -> None:
        """Do what is left to do of a training that has taken all its steps; `train` would take one more."""
        keeps_the_best = self.args.load_best_model_at_end and start.best is not None and start.best.is_dir()
        checkpoint = start.best if keeps_the_best else start.checkpoint
        self.state = TrainerState.load_from_json(str(start.checkpoint / "trainer_state.json"))
        self.state.best_model_checkpoint = str(checkpoint) if keeps_the_best else None
        model: Any = self.model
        model.load_adapter(str(checkpoint), active_adapter(model), is_trainable=True)

    def close_progress_bar(self) -> None:
        """End the bar's line, so that what is printed next stands on its own; needed after a failure."""
        if self._show.training_bar is not None:
            self._show.training_bar.close()

    def get_batch_samples(self, *arguments: Any) -> Any:
        with self._times.fetch():
            batches, items = super().get_batch_samples(*arguments)
        if not batches or self._skips:
            self._times.drop()  # the data ended with the step before, or earlier steps' rows were read past
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

    def _load_callback_state(self) -> None:
        """Called when the state of a checkpoint is loaded."""
        super()._load_callback_state()
        if self._of_another_run:
            self._best = (None, None, None)  # its validations may be of other rows

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer does it, but aside, and then in one move to its place. One that cannot be written ends nothing."""
        step = self.state.global_step
        place = self._directory.path / f"checkpoint-{step}"
        try:
            self._directory.begin()
            states: Any = self.state.stateful_callbacks
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):  # the state may come from a run that had no such callback
                    states.setdefault(type(callback).__name__, callback.state())
            with aside(place.parent) as self._aside:
                super()._save_checkpoint(model, trial)
                written = self._aside / place.name
                self._correct_best_checkpoint(written)
                self._directory.add_to(written, metrics=self._metrics.text, seconds=self.seconds)
                put_in_place(written, place)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch's writer of files raises RuntimeError
            logger.warning("%s could not be written: %s; the training goes on", place, _reason(error))
            if self.state.best_global_step == step:
                self._best = self._best_before
            return
        finally:
            self._aside = None
        self._directory.made(place)
        try:
            best = self.state.best_model_checkpoint
            prune(place.parent, step, limit=self._checkpoints_kept, keep=[step_of(Path(best))] if best else [])
        except OSError as error:
            logger.warning("older checkpoints than %s could not be removed: %s", place, _reason(error))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._best_before = self._best
        return bool(super()._determine_best_metric(metrics, trial))

    @property
    def _best(self) -> _Best:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    @_best.setter
    def _best(self, best: _Best) -> None:
        self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = best

    def _correct_best_checkpoint(self, written: Path) -> None:
        """Trainer looked for the best checkpoint aside; say where it will be."""
        if self.state.best_global_step:
            best = self._directory.path / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or best.name == written.name:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(written / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter as the run's end saves it. Trainer would ask the hub for the base model, at every checkpoint."""
        model: Any = self.model
        directory = Path(str(output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        write_adapter(model, directory, base_model=self._base_model)


def perplexity(loss: float) -> float:
    """e to the loss in nats a token; infinite where that is over the largest float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _real_tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError | SafetensorError):
        return reason(error)
    return f"torch could not write a file, as on a full disk ({first_line(error)})"


class _Show(ProgressCallback):
    """The progress bar of transformers, with a line per logging step, validation and epoch."""

    def __init__(self, metrics: RunMetrics, directory: RunDirectory, times: StepTimes, extras: TrainerExtras) -> None:
        super().__init__()
        self._times = times
        self.measured = self.since_last_log = StepMeasure()
        self._patience, self._threshold = extras.early_stopping_patience, extras.early_stopping_threshold
        self._metrics = metrics
        self._directory = directory

    @staticmethod
    def _draws_bar(args: TrainingArguments) -> bool:
        return not args.disable_tqdm and sys.stderr.isatty()  # a log file has the lines

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        try:
            self._directory.begin()
        except OSError as error:
            logger.warning("%s cannot be written: %s; the training goes on", self._directory.path, _reason(error))
        measure = self._times.end_step()
        self.measured += measure
        self.since_last_log += measure
        self._metrics.end_step(state.global_step, float(state.epoch or 0), measure.as_line())
        if self._draws_bar(args):
            super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.fp16:  # there the scaler of the gradient leaves out such steps
            self._check_finite(state.global_step + 1, kwargs["model"])

    def _check_finite(self, step: int, model: nn.Module) -> None:
        """Raises `RunFailed` before the adapters take a step by numbers that are none."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        named = {"loss": self._metrics.loss_until_now, "gradient": float(nn.utils.get_total_norm(gradients))}
        for name, value in named.items():
            if not math.isfinite(value):
                raise RunFailed(f"the {name} of step {step} is {value}: try a lower train.learning_rate")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A state that comes from a checkpoint has the intervals of that time.
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
