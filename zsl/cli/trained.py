"""The model of what `zsl export` and `zsl merge` are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zsl.errors import ModelError

if TYPE_CHECKING:
    from zsl.split.reference import ModelReference
    from zsl.training.trained import Trained


def model_of(trained: Trained, named: str | None) -> ModelReference:
    """The model that is `named`, else the one that the run, or the adapter, says.

    Raises `ConfigError` if there is none, `ModelError` if it cannot be loaded.
    """
    from zsl.split.reference import resolve
    from zsl.split.union import named_model

    if named:
        return resolve(named)
    said = trained.model or named_model(trained.adapters)
    try:
        return resolve(said)
    except ModelError as error:
        who = "run" if trained.model else "adapter"
        raise ModelError(f"{error}; so the {who} says: name the model with --model") from error
