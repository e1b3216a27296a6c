"""The embedded trunk of a configuration. Imports no torch, so that it can start before the command's slow imports."""

from __future__ import annotations

from zsl.training.config.config import TrunkTable
from zsl.trunk.daemon.embedded import EmbeddedTrunk


def embedded_trunk(table: TrunkTable, model: str, dtype: str) -> EmbeddedTrunk:
    """Return the trunk of a model, for `with`, which starts it."""
    return EmbeddedTrunk(model, table.cut, dtype, deterministic=table.deterministic is not None)
