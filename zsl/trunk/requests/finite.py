"""Find values in raw buffers that are not finite, without torch."""

from __future__ import annotations

import numpy as np

from zsl.wire.frames import Frame
from zsl.wire.messages import WireDtypeName

FEW = 16 * 1024  # elements, for which `errstate` would take longest
# Exponent bits of infinity and NaN.
_EXPONENTS = {"f32": (np.uint32, 0x7F80_0000), "f16": (np.uint16, 0x7C00), "bf16": (np.uint16, 0x7F80)}


def not_finite(dtype: WireDtypeName, buffer: Frame) -> list[int]:
    """Return the indices of the elements of a buffer of floating-point numbers that are infinite or NaN."""
    if dtype == "f32":
        floats = np.frombuffer(buffer, dtype=np.float32)
        if floats.size <= FEW and np.isfinite(floats).all():
            return []
        # min and max allocate nothing, and both return NaN if there is one.
        with np.errstate(invalid="ignore"):
            if not floats.size or (np.isfinite(floats.min()) and np.isfinite(floats.max())):
                return []
    integer, exponent = _EXPONENTS[dtype]
    bits = np.frombuffer(buffer, dtype=integer) & integer(exponent)
    found: list[int] = np.flatnonzero(bits == exponent).tolist()
    return found
