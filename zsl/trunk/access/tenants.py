"""Tenants and their quotas: read and check `tenants.toml`. Imports no sockets and no torch.

    [tenants.alice]
    public_key = "…"             # the public-key of alice.key
    weight = 2.0                 # relative share of device time; default 1
    max_sessions = 64
    max_inflight_bytes = "2GiB"
    max_stash_bytes = "1GiB"     # stashes of pending backwards; default: the daemon's own limit
    max_adapter_bytes = "1GiB"   # adapters in the trunk's layers; default: the daemon's own limit
    max_cache_bytes = "1GiB"     # keys and values of generations; default: the daemon's own limit

Each authenticated key is one tenant: the quotas apply to all of its clients together.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zsl.errors import ConfigError
from zsl.files.small_files import read_toml
from zsl.text.byte_size import parse_size
from zsl.transport.curve_keys import NAME, is_public_key

# Bounds on weights, which divide device seconds: with extreme ones, a sum of floats loses small addends.
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
_HOW_TO_WRITE = "write a table [tenants.NAME] with a public_key for each client (`zsl keygen NAME` shows its lines)"


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _key(value: str) -> str:
    if not is_public_key(value):
        raise ValueError("is not a public key; copy the public-key of the tenant's .key file")
    return value


_Bytes = Annotated[int, BeforeValidator(_size), Field(strict=True)]


class _TenantTable(BaseModel):
    """Keys of a table `[tenants.NAME]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    public_key: Annotated[str, AfterValidator(_key)]
    weight: float = Field(default=1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT)
    max_sessions: int = Field(default=64, ge=1)
    max_inflight_bytes: Annotated[_Bytes, Field(ge=1)] = 2 << 30
    max_stash_bytes: Annotated[_Bytes, Field(ge=0)] | None = None
    max_adapter_bytes: Annotated[_Bytes, Field(ge=1)] | None = None
    max_cache_bytes: Annotated[_Bytes, Field(ge=1)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenants: dict[str, _TenantTable] = {}


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant and its quotas. `max_stash_bytes`, `max_adapter_bytes`, `max_cache_bytes` None: only the daemon's
    own limit applies."""

    name: str
    public_key: str
    weight: float
    max_sessions: int
    max_inflight_bytes: int
    max_stash_bytes: int | None
    max_adapter_bytes: int | None = None
    max_cache_bytes: int | None = None


class Allowlist:
    """Tenants of a file, as of its last valid reading. Raises `ConfigError` if the first reading fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tenants = read_tenants(path)

    def reload(self) -> None:
        """Read the file again. Raises `ConfigError`, and keeps the tenants, if it is invalid."""
        self._tenants = read_tenants(self._path)

    def allows(self, public_key: str) -> bool:
        """Return whether this public key belongs to a tenant."""
        return self.by_key(public_key) is not None

    def by_key(self, public_key: str) -> Tenant | None:
        """Return the tenant with this public key (z85), or None."""
        return self._tenants.get(public_key)


def read_tenants(path: Path) -> dict[str, Tenant]:
    """Read the tenants of a file, by public key. Raises `ConfigError`, which names file, table and key."""
    try:
        tables = read_toml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; {_HOW_TO_WRITE}") from None
    try:
        checked = _File.model_validate(tables).tenants
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    if not checked:
        raise ConfigError(f"{path}: no tenants; {_HOW_TO_WRITE}")
    names: dict[str, str] = {}
    for name, table in checked.items():
        if NAME.fullmatch(name) is None:
            raise ConfigError(f"{path}: [tenants.{name!r}]: a name has up to 64 letters, digits, - and _")
        other = names.setdefault(table.public_key, name)
        if other != name:
            raise ConfigError(f"{path}: tenants.{name}.public_key is that of tenants.{other}, too; each needs its own")
    return {table.public_key: Tenant(name, **table.model_dump()) for name, table in checked.items()}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    shown, kind = ".".join(path), problem["type"]
    if kind == "extra_forbidden":
        known: dict[str, Any] = _File.model_fields if len(path) == 1 else _TenantTable.model_fields
        near = difflib.get_close_matches(path[-1], list(known), n=1)
        return f"unknown key {shown}" + (f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else "")
    if kind == "missing":
        return f"{shown} is missing"
    if kind in ("model_type", "dict_type"):
        return f"{shown} is a table: write [{'.'.join(path[:1])}.NAME] and its keys below it"
    return f"{shown}: {problem['msg'].removeprefix('Value error, ')}"
