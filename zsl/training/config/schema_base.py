"""What all tables of the configuration have in common. Knows no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """A table of the TOML file: its keys are those here and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
