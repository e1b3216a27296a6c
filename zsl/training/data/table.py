"""`[data]`: what to train on. Knows no torch."""

from __future__ import annotations

from pydantic import Field

from zsl.training.table import Table


class DataTable(Table):
    """`[data]`. `name` is `synthetic`, `python-docs` or the path of a text file."""

    name: str = "synthetic"
    samples: int | None = Field(default=None, ge=1)
    max_length: int = Field(default=128, ge=2)
    seed: int = Field(default=0, ge=0)
