"""Find trained adapters in directories, with the model and settings from their `run.json`.

Imports no torch; the weights are read elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zsl.errors import ConfigError, ModelError
from zsl.training.directory.checkpoints import checkpoints_in
from zsl.training.directory.record import MODEL_CONFIGURATION, MODEL_NAME, WEIGHTS, read_record

_ADAPTER = "adapter_config.json"
_SIDES = ("bottom_lora", "trunk_lora", "top_lora")
# Facts of a run's record, and their names in an adapter's description.
_SHOWN = {"the trunk's layers": "cut", "the trunk's mode": "gradient mode"}


@dataclass(frozen=True)
class Trained:
    """Directories of adapters, and the `model` that they were trained on; None where no record names it.

    `weights_digest` and `config_digest` are the model's, and `facts` are settings to show.
    """

    adapters: Sequence[Path]
    model: str | None = None
    weights_digest: str | None = None
    config_digest: str | None = None
    facts: dict[str, str] = field(default_factory=dict)


def find_trained(places: Sequence[Path]) -> Trained:
    """Find the adapters in `places`: directories of runs, of checkpoints, or of adapters.

    Raises `ConfigError` for a place without adapters, `ModelError` for adapters of different models.
    """
    adapters = [adapter for place in places for adapter in _adapters_in(place)]
    records = [record for adapter in adapters if (record := read_record(adapter)) is not None]
    digests = {}
    for fact in (WEIGHTS, MODEL_CONFIGURATION):
        found = {record.facts[fact] for record in records if fact in record.facts}
        if len(found) > 1:
            raise ModelError(f"these adapters differ in {fact}; they are not of one model")
        digests[fact] = next(iter(found), None)
    facts = {}
    for record in records:
        facts.update({shown: record.facts[fact] for fact, shown in _SHOWN.items() if fact in record.facts})
    models = [str(record.configuration[MODEL_NAME]) for record in records if MODEL_NAME in record.configuration]
    return Trained(adapters, models[0] if models else None, digests[WEIGHTS], digests[MODEL_CONFIGURATION], facts)


def _adapters_in(place: Path) -> list[Path]:
    if not place.is_dir():
        raise ConfigError(f"{place}: there is no such directory")
    if (place / _ADAPTER).is_file():
        return [place]
    checkpoints = checkpoints_in(place)
    if (place / "adapter" / _ADAPTER).is_file():  # written at once; the sides may be of two saves
        found = [place / "adapter"]
    else:
        found = [place / side for side in _SIDES if (place / side / _ADAPTER).is_file()]
    if not found:
        there = f"; there is {checkpoints[0]}, name that" if checkpoints else ""
        raise ConfigError(f"{place} holds no adapter{there}")
    run, made_by = read_record(place), read_record(found[0])
    if run is not None and made_by is not None and run.run != made_by.run:
        of_this_run = f"{checkpoints[0]}, or " if checkpoints else ""
        raise ConfigError(
            f"{place} holds a run that has saved no adapter yet; what is there is of an earlier one: "
            f"name {of_this_run}{' and '.join(map(str, found))}"
        )
    return found
