"""Parse sizes in bytes with units, and round them to MiB.

`pydantic.ByteSize` reads `1.2.3GB` as 1 byte, and accepts digits of any script.
"""

from __future__ import annotations

import re

from zsl.errors import ConfigError

UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
# More memory than any machine has.
MAX_BYTES = 1 << 60


def parse_size(text: str) -> int:
    """Parse `4GiB`, `500 MB` or `1024` into bytes. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    unit = None if match is None else UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not a size; write for example 4GiB or 500MB")
    nbytes = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if nbytes > MAX_BYTES:
        raise ConfigError(f"{text!r} is more than any machine has")
    return nbytes


def to_mib(nbytes: int) -> int:
    """Return a number of bytes in whole MiB, rounded up."""
    return -(-nbytes // UNITS["mib"])
