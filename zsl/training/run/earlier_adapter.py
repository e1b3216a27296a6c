"""The adapter that `peft.adapter` names, for a training to go on from. Knows files, and loads nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from zsl.errors import ConfigError
from zsl.training.directory.checkpoints import checksum
from zsl.training.directory.trained import find_trained
from zsl.wire.messages import ModelIdentity


@dataclass(frozen=True)
class EarlierAdapter:
    """`place` is a directory or a hub id, `weights_digest` that of the model that it was trained on, if that is said.

    `facts` are a digest of its file: what the name stands for can be another tomorrow.
    """

    place: str
    weights_digest: str | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def found(cls, named: str) -> EarlierAdapter:
        """The adapter that `peft.adapter` names, also by the directory of its run. Raises `ConfigError`."""
        if not Path(named).is_dir():
            return cls(named)
        trained = find_trained([Path(named)])
        if len(trained.adapters) > 1:
            raise ConfigError(f"peft.adapter = {named!r} holds two sides: make one adapter of them with `zsl export`")
        (place,) = trained.adapters
        file = place / SAFETENSORS_WEIGHTS_NAME
        content = {"the adapter that it began with": checksum(file)} if file.is_file() else {}
        return cls(str(place), trained.weights_digest, content)

    def check_is_of(self, model: ModelIdentity) -> None:
        """Raises `ConfigError` if it was trained on other weights."""
        if self.weights_digest not in (None, model.weights_digest):
            raise ConfigError(f"peft.adapter = {self.place!r} was trained on other weights than this model's")
