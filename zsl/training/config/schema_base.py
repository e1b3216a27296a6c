"""Base class of the configuration's tables. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """Base of a TOML table: refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
