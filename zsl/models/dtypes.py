"""Names of the dtypes that a user may choose. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

from typing import Literal, get_args

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
