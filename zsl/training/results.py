"""What a run leaves in its directory when it ends: adapters, beside the metrics that are there already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from zsl.errors import ModelError, RunFailed
from zsl.split.adapter import save_adapter
from zsl.split.reference import ModelReference
from zsl.split.sides import Sides
from zsl.training.overview import SIDES
from zsl.training.resume import METRICS


@dataclass(frozen=True)
class Results:
    """The trained model, and where what was trained goes."""

    model: PeftModel
    sides: Sides
    reference: ModelReference
    directory: Path

    def save(self) -> list[str]:
        """Write `adapter/`, `bottom_lora/` and `top_lora/`; a line about each. Raises `RunFailed`."""
        base_model = self.reference.hub_id
        save_adapter(self.model, self.directory / "adapter", base_model=base_model)
        lines = [f"{self.directory / 'adapter'}  (loads on the whole model)"]
        for side in SIDES:
            target = self.directory / f"{side}_lora"
            try:
                save_adapter(self.model, target, base_model=base_model, sides=self.sides, only=side)
            except ModelError:
                continue  # the configuration puts no adapter on this side
            kilobytes = (target / "adapter_model.safetensors").stat().st_size / 1000
            lines.append(f"{target}  ({kilobytes:.0f} kB)")
        lines.append(f"{self.directory / METRICS}  (a line per step)")
        return lines

    def save_after_a_failure(self) -> str:
        """Save after a failure, which another one must not hide; what became of it, in words."""
        try:
            self.save()
        except RunFailed as error:
            return f"the adapters of the steps until then are not saved: {error}"
        return f"the adapters of the steps until then are in {self.directory}"
