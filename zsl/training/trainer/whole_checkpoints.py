"""Mixin for Hugging Face `Trainer` that writes checkpoints atomically, tracks the best, and survives failed writes.

All private methods of Trainer that zsl overrides are in this file, read against transformers 5.23.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from zsl.adapters.save import write_adapter
from zsl.files.durable import aside, reason
from zsl.text.first_line import first_line
from zsl.training.directory.checkpoints import prune, put_in_place, step_of
from zsl.training.directory.resume import RunDirectory, Start
from zsl.training.report.metrics import RunMetrics

logger = logging.getLogger(__name__)

_Best = tuple[float | None, int | None, str | None]  # validation loss, step, checkpoint


class WholeCheckpointsMixin(Trainer):
    """Mixin before `Trainer`: writes each checkpoint to a temporary directory, then moves it into `directory`.

    `start` is the checkpoint of a resumed run.
    """

    def __init__(
        self,
        *,
        metrics: RunMetrics,
        directory: RunDirectory,
        base_model: str | None = None,
        start: Start | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._metrics = metrics
        self._directory = directory
        self._base_model = base_model
        self._began = time.monotonic() - (start.seconds if start else 0.0)
        self._of_another_run = start is not None and start.of_steps is None
        self._aside: Path | None = None
        self._best_before: _Best = (None, None, None)
        # Trainer would remove other programs' checkpoints, and at the end those needed if saving the adapters fails.
        self._checkpoints_kept, self.args.save_total_limit = self.args.save_total_limit, None

    @property
    def seconds(self) -> float:
        """Seconds of training, in all processes of the run."""
        return time.monotonic() - self._began

    def _load_callback_state(self) -> None:
        """Forget the best checkpoint of another run, once Trainer has loaded its state."""
        super()._load_callback_state()
        if self._of_another_run:
            self._best = (None, None, None)  # its validations may be of other rows

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, in a temporary directory, then move it to its place. Failed writes only warn."""
        step = self.state.global_step
        place = self._directory.path / f"checkpoint-{step}"
        try:
            self._directory.begin()
            states: Any = self.state.stateful_callbacks
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):  # the loaded state may lack this callback
                    states.setdefault(type(callback).__name__, callback.state())
            with aside(place.parent) as self._aside:
                super()._save_checkpoint(model, trial)
                written = self._aside / place.name
                self._correct_best_checkpoint(written)
                self._directory.add_to(written, metrics=self._metrics.text, seconds=self.seconds)
                put_in_place(written, place)
        except (OSError, SafetensorError, RuntimeError) as error:  # `torch.save` raises RuntimeError
            logger.warning("%s could not be written: %s; the training goes on", place, write_error(error))
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
            logger.warning("older checkpoints than %s could not be removed: %s", place, write_error(error))

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
        """Correct the path of the best checkpoint: Trainer recorded one in the temporary directory."""
        if self.state.best_global_step:
            best = self._directory.path / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or best.name == written.name:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(written / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the adapter as at the run's end. Trainer would query the hub for the base model at each checkpoint."""
        model: Any = self.model
        directory = Path(str(output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        write_adapter(model, directory, base_model=self._base_model)


def write_error(error: Exception) -> str:
    """Return the reason why a file could not be written, in one line."""
    if isinstance(error, OSError | SafetensorError):
        return reason(error)
    return f"torch could not write a file, as on a full disk ({first_line(error)})"
