"""Record of a run (`run.json`): its configuration and digests, compared before it is resumed.

In the directory of a run it also tells whether the run has finished; in a checkpoint, what resuming needs besides
Trainer's files; with an adapter, which model it belongs to. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from zsl.training.config.config import LAYERS, TrainConfig

RECORD = "run.json"
MODEL_NAME = "model.name"  # a key of `RunRecord.configuration`
# Keys of `RunRecord.facts`.
DATA, MODEL_CONFIGURATION, WEIGHTS = "the rows of the data", "the model's configuration", "the model's weights"

# Keys that may change when a run is resumed: addresses, timeouts, display, and how many checkpoints are kept. The
# results of a training do not depend on them.
_MAY_DIFFER = {
    "trunk.endpoint",
    "trunk.connect_timeout_seconds",
    "trunk.request_timeout_seconds",
    "trunk.server_key",
    "trunk.client_key",
    "train.output_dir",
    "train.save_steps",
    "train.save_total_limit",
    "train.disable_tqdm",
    "train.report_to",
    "train.run_name",
    "train.project",
    "train.sample_prompt",
}
_MAY_DIFFER_PREFIXES = ("train.log_", "train.logging_", "train.trackio_", "train.hub_", "train.push_to_")


class RunRecord(BaseModel):
    """`configuration` by `table.key`; `facts` about what it names: digests of the data, of the weights, …"""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    configuration: dict[str, Any]
    facts: dict[str, str] = {}
    run: str = ""  # a random id: another run may have the same configuration
    finished: bool = False
    seconds: float = 0.0  # of training so far

    def of_adapter(self) -> RunRecord:
        """Return the record to save with an adapter: the model and its split, without the data."""
        configuration = {key: value for key, value in self.configuration.items() if key == MODEL_NAME}
        facts = {fact: value for fact, value in self.facts.items() if fact != DATA}
        return RunRecord(configuration=configuration, facts=facts, run=self.run)

    def differences(self, here: RunRecord) -> list[str]:
        """Return the differences to the run of `here`, in words; an empty list if it is the same run.

        Facts that only one of them has are not compared.
        """
        keys = sorted(self.configuration.keys() | here.configuration.keys())
        words = [_difference(key, self.configuration.get(key), here.configuration.get(key)) for key in keys]
        return [difference for difference in words if difference] + self._differences_of(self.facts, here)

    def model_differences(self, here: RunRecord) -> list[str]:
        """Return the differences to the model of `here`, in words."""
        return self._differences_of((MODEL_CONFIGURATION, WEIGHTS), here)

    def _differences_of(self, facts: Iterable[str], here: RunRecord) -> list[str]:
        both = [
            (fact, self.facts[fact], here.facts[fact]) for fact in facts if fact in self.facts and fact in here.facts
        ]
        return [difference for fact, there, now in both if (difference := _difference(fact, there, now))]


def configuration_of(config: TrainConfig) -> dict[str, Any]:
    """Return every key that the results of a training depend on."""
    tables = config.model_dump(mode="json", exclude_none=True)
    keys = {f"{table}.{key}": value for table, fields in tables.items() for key, value in fields.items()}
    if isinstance(config.resume_from, bool):
        keys.pop("train.resume_from_checkpoint", None)  # a bool names no checkpoint
    if config.layers == "client":
        keys.pop(f"peft.{LAYERS}", None)  # the default, which older records do not name
    return {k: v for k, v in keys.items() if k not in _MAY_DIFFER and not k.startswith(_MAY_DIFFER_PREFIXES)}


def read_record(directory: Path) -> RunRecord | None:
    """Read the record in a directory; None if it is missing or invalid."""
    try:
        return RunRecord.model_validate_json((directory / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def as_bytes(record: RunRecord) -> bytes:
    """Return the content of `run.json`."""
    return (record.model_dump_json(indent=1) + "\n").encode()


def _difference(name: str, there: Any, here: Any) -> str | None:
    if there == here:
        return None
    return f"{name} ({_shown(there)} there, {_shown(here)} here)"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return str(value)[:12] if re.fullmatch("[0-9a-f]{32,}", str(value)) else str(value)  # a digest
