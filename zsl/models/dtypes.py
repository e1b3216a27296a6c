"""The dtypes that a user may choose, by torch's names for them. Knows no torch: `--help` shows them."""

from __future__ import annotations

from typing import Literal, get_args

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
