"""Resolve the base model of the adapters given to `zsl export` and `zsl merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zsl.errors import ModelError

if TYPE_CHECKING:
    from zsl.models.reference import ModelReference
    from zsl.training.directory.trained import Trained


def model_of(trained: Trained, named: str | None) -> ModelReference:
    """Resolve the model `named`, or else the one that the run, or the adapter, names.

    Raises `ConfigError` if neither names one, `ModelError` if it cannot be loaded, or is not the one that was trained.
    """
    from zsl.models.identity import config_digest

    reference = _resolved(trained, named)
    if trained.config_digest not in (None, config_digest(reference.config)):
        raise ModelError(
            f"{reference.text} has another configuration than the model that was trained"
            f"{f', {trained.model}' if trained.model and named else ''}: name that one with --model"
        )
    return reference


def _resolved(trained: Trained, named: str | None) -> ModelReference:
    from zsl.adapters.union import named_model
    from zsl.models.reference import resolve

    if named:
        return resolve(named)
    said = trained.model or named_model(trained.adapters)
    try:
        return resolve(said)
    except ModelError as error:
        who = "run" if trained.model else "adapter"
        raise ModelError(f"{error}; so the {who} says: name the model with --model") from error
