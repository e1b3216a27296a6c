"""Layout of an adapter in the trunk's layers: its modules, and the order of their weights in one flat buffer.

    LoRA:   A [rank, in], B [out, rank], bias [out] if it has one
    DoRA:   A [rank, in], B [out, rank], magnitude [out]
    IA³:    vector [in] or [out]
    prefix: keys and values, each [rows * tokens, heads * dim]

Sent as JSON, checked once when it is decoded, as the headers are. No sockets and no torch.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import Annotated, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zsl.errors import MalformedError
from zsl.wire.frames import Frame
from zsl.wire.messages import DTYPE_BYTES, MAX_TEXT_CHARS, FloatDtypeName, Name

MAX_LAYOUT_BYTES = 4 << 20
MAX_MODULES = 16_384
MAX_RANK = MAX_FEATURES = MAX_PREFIX = 2**20

Shape = tuple[int, ...]


class _Module(BaseModel):
    """One adapted module. `path`: index of the layer in the whole model and path within it (`7.mlp.up_proj`)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    method: str
    path: Name

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the weights, in their order."""
        raise NotImplementedError

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(map(prod, self.shapes))


class LinearModule(_Module):
    """One linear module.

    If it has several adapters, it is listed once for each, in the order of their sum or product. If it has adapters of
    both methods, those of IA³ scale the input before, and the output after LoRA.
    """

    inputs: Annotated[int, Field(ge=1, le=MAX_FEATURES)]
    outputs: Annotated[int, Field(ge=1, le=MAX_FEATURES)]


class LoraModule(LinearModule):
    """LoRA: the output is `base(x) + B(A(dropout(x))) * scaling` (Hu et al., "LoRA", 2021), computed as PEFT does.

    With a magnitude it is DoRA (Liu et al., 2024): the rows of `W + scaling * B A` are scaled to these norms. PEFT has
    no DoRA with a bias.
    """

    method: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    scaling: Annotated[float, Field(allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    has_bias: bool
    has_magnitude: bool

    @model_validator(mode="after")
    def _has_one_vector(self) -> Self:
        if self.has_bias and self.has_magnitude:
            raise ValueError("has a bias and a magnitude, which exclude each other")
        return self

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of A and B, and of B's bias or the magnitude, if any."""
        matrices: tuple[Shape, ...] = (self.rank, self.inputs), (self.outputs, self.rank)
        return (*matrices, (self.outputs,)) if self.has_bias or self.has_magnitude else matrices


class Ia3Module(LinearModule):
    """IA³: the output is `base(x * vector)` if `at_input`, `base(x) * vector` otherwise (Liu et al., 2022)."""

    method: Literal["ia3"] = "ia3"
    at_input: bool

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shape of the vector."""
        return ((self.inputs if self.at_input else self.outputs,),)


class PrefixLayer(_Module):
    """Keys and values of virtual tokens, in front of each row's own (Li and Liang, "Prefix-Tuning", 2021).

    `path`: index of the layer. Each of the trunk's layers has one, or none has, and all have equally many rows and
    tokens. `rows`: those of the request, or 1 if they have the same prefix.
    """

    method: Literal["prefix"] = "prefix"
    rows: Annotated[int, Field(ge=1, le=MAX_PREFIX)]
    tokens: Annotated[int, Field(ge=1, le=MAX_PREFIX)]
    heads: Annotated[int, Field(ge=1, le=MAX_FEATURES)]  # of keys and of values
    dim: Annotated[int, Field(ge=1, le=MAX_FEATURES)]  # of a head

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of keys and values."""
        return ((self.rows * self.tokens, self.heads * self.dim),) * 2


AdaptedModule = Annotated[LoraModule | Ia3Module | PrefixLayer, Field(discriminator="method")]


class AdapterLayout(BaseModel):
    """Modules of an adapter, in the order of their weights. `dtype`: of the computation with them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dtype: FloatDtypeName
    modules: Annotated[tuple[AdaptedModule, ...], Field(min_length=1, max_length=MAX_MODULES)]

    @cached_property
    def elements(self) -> int:
        """Number of weights."""
        return sum(module.elements for module in self.modules)

    @cached_property
    def magnitudes(self) -> int:
        """Number of elements of all magnitudes; 0 without DoRA."""
        of_lora = (module for module in self.modules if isinstance(module, LoraModule))
        return sum(module.outputs for module in of_lora if module.has_magnitude)

    @cached_property
    def prefix(self) -> tuple[PrefixLayer, ...]:
        """Keys and values in front of the layers' own."""
        return tuple(module for module in self.modules if isinstance(module, PrefixLayer))

    def nbytes(self, dtype: FloatDtypeName) -> int:
        """Return the bytes of the flat weights in a dtype."""
        return self.elements * DTYPE_BYTES[dtype]

    def encoded(self) -> bytes:
        """Return the layout as JSON."""
        return self.model_dump_json().encode()


def decode_layout(frame: Frame) -> AdapterLayout:
    """Return the layout in a buffer. Raises `MalformedError`."""
    if len(frame) > MAX_LAYOUT_BYTES:
        raise MalformedError(f"a layout of {len(frame)} bytes is over {MAX_LAYOUT_BYTES}")
    try:
        return AdapterLayout.model_validate_json(bytes(frame))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(ascii(str(part)[:40])[1:-1] for part in problem["loc"]) or "layout"
        raise MalformedError(f"layout: {where}: {problem['msg']}"[:MAX_TEXT_CHARS]) from None


class VersionDigest:
    """Incremental digest of an adapter version (xxh3, 128 bits). A session compares its own versions only, so that
    collisions on purpose harm nobody else."""

    def __init__(self, layout: Frame, dtype: FloatDtypeName) -> None:
        self._digest = xxhash.xxh3_128(f"{dtype} {len(layout)} ".encode())
        self._digest.update(layout)

    def update(self, weights: Frame) -> None:
        """Add the next bytes of the flat weights."""
        self._digest.update(weights)

    def digest(self) -> bytes:
        """Return the digest so far, 16 bytes."""
        return self._digest.digest()


def version_of(layout: Frame, dtype: FloatDtypeName, weights: Frame) -> bytes:
    """Return the digest of an adapter version, 16 bytes."""
    digest = VersionDigest(layout, dtype)
    digest.update(weights)
    return digest.digest()
