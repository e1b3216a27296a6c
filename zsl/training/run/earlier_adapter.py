"""Find the existing adapter that `peft.adapter` names, to start a training from. Loads no weights."""

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
    """An existing adapter: `place` is its directory or hub id.

    `weights_digest` is that of the model that it was trained on, if known. `facts` hold a digest of its file, to detect
    that the file of that name changes.
    """

    place: str
    weights_digest: str | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def found(cls, named: str) -> EarlierAdapter:
        """Find the adapter at `named`: its directory, its run's directory or a hub id. Raises `ConfigError`."""
        if not Path(named).is_dir():
            return cls(named)
        trained = find_trained([Path(named)])
        if len(trained.adapters) > 1:
            raise ConfigError(f"peft.adapter = {named!r} holds several sides: join them with `zsl export`")
        (place,) = trained.adapters
        file = place / SAFETENSORS_WEIGHTS_NAME
        content = {"the adapter that it began with": checksum(file)} if file.is_file() else {}
        return cls(str(place), trained.weights_digest, content)

    def check_is_of(self, model: ModelIdentity) -> None:
        """Raise `ConfigError` if the adapter was trained on other weights than the model's."""
        if self.weights_digest not in (None, model.weights_digest):
            raise ConfigError(f"peft.adapter = {self.place!r} was trained on other weights than this model's")
