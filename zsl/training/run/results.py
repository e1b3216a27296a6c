"""Save the results of a run to its directory: the adapters and the loss plot."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from zsl.adapters.save import remove_adapter, save_adapter
from zsl.errors import ModelError, RunFailed
from zsl.models.reference import ModelReference
from zsl.split.sides import Sides
from zsl.training.directory.record import RECORD, RunRecord, as_bytes
from zsl.training.directory.resume import METRICS_FILE
from zsl.training.report.metrics import RunMetrics
from zsl.training.report.overview import SIDES
from zsl.training.report.plot import write_loss_plot

PLOT = "loss.png"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """The trained model, and the directory to save it to."""

    model: PeftModel
    sides: Sides
    reference: ModelReference
    directory: Path
    metrics: RunMetrics
    record: RunRecord

    def save(self) -> list[str]:
        """Write `adapter/`, the adapter of each side and `loss.png`; return a line for each. Raises `RunFailed`."""
        base_model = self.reference.hub_id
        # A copy of the record with each adapter survives a move, and another run in this directory.
        beside = {RECORD: as_bytes(self.record.of_adapter())}
        save_adapter(self.model, self.directory / "adapter", base_model=base_model, beside=beside)
        lines = [f"{self.directory / 'adapter'}  (loads on the whole model)"]
        for side in SIDES:
            target = self.directory / f"{side}_lora"
            try:
                save_adapter(self.model, target, base_model=base_model, sides=self.sides, only=side, beside=beside)
            except ModelError:  # no adapter on this side: the existing one is another run's
                remove_adapter(target, RECORD)
                continue
            kilobytes = (target / SAFETENSORS_WEIGHTS_NAME).stat().st_size / 1000
            lines.append(f"{target}  ({kilobytes:.0f} kB)")
        lines.append(f"{self.directory / METRICS_FILE}  (a line per step)")
        if self.metrics.steps and self._draw_plot():
            lines.append(f"{self.directory / PLOT}")
        return lines

    def _draw_plot(self) -> bool:
        """Draw the losses; return whether the file could be written."""
        file = self.directory / PLOT
        try:
            write_loss_plot(file, self.metrics.steps, self.metrics.validations, title=self.reference.text)
        except RunFailed as error:
            logger.warning("%s", error)
            return False
        return True

    def save_after_a_failure(self) -> str:
        """Save after a failure, and return a message in place of raising, so as not to hide that failure."""
        try:
            self.save()
        except RunFailed as error:
            return f"the adapters of the steps until then are not saved: {error}"
        return f"the adapters of the steps until then are in {self.directory}"
