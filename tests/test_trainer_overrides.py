"""Private methods of `Trainer` that zsl overrides are the ones it was written for."""

from __future__ import annotations

import hashlib
import inspect

import transformers
from transformers import Trainer

from zsl.training.trainer.trainer import SplitTrainer
from zsl.training.trainer.whole_checkpoints import WholeCheckpointsMixin

READ_AGAINST = "5.23"
# The first digits of the SHA-256 of each method's source there.
SOURCES = {
    "_determine_best_metric": "7aa77355a0c33b67",
    "_get_output_dir": "97172085342ac46c",
    "_load_callback_state": "2d0eae17b14b314d",
    "_save": "b136889e87928376",
    "_save_checkpoint": "a9111e30faa99339",
}


def overridden_private(mixin: type) -> set[str]:
    names = {name for name in vars(mixin) if name.startswith("_") and not name.startswith("__")}
    return {name for name in names if hasattr(Trainer, name)}


def test_they_are_in_one_class_and_in_the_table() -> None:
    ours = [base for base in SplitTrainer.__mro__ if base.__module__.startswith("zsl.")]
    overriding = {base: overridden_private(base) for base in ours if overridden_private(base)}
    assert overriding == {WholeCheckpointsMixin: SOURCES.keys()}


def test_they_have_the_source_that_was_read() -> None:
    """One that has changed: read it beside whole_checkpoints.py, then write its digest and the version here."""
    found = {
        name: hashlib.sha256(inspect.getsource(getattr(Trainer, name)).encode()).hexdigest()[:16] for name in SOURCES
    }
    assert found == SOURCES, f"transformers {transformers.__version__}, read against {READ_AGAINST}"
