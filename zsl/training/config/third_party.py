"""Make a third-party dataclass of a table, with checks of its keys and types."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from zsl.errors import ConfigError
from zsl.text.first_line import first_line
from zsl.training.config.unknown_keys import check_keys

T = TypeVar("T")
_FOREIGN = (ValueError, TypeError, KeyError, ImportError)


def make_foreign(
    cls: Callable[..., T],
    where: str,
    table: str,
    values: Mapping[str, Any],
    *,
    check: Callable[[T], None] = lambda made: None,
) -> T:
    """Return `cls(**values)` of a dataclass `cls`, after `check` of it raises no error.

    `where` (a file) and `table` are for error texts. Values are converted to the field's type (`"2e-4"` to a float).
    Raises `ConfigError`, which names the offending key if it can be found.
    """
    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    check_keys(where, table, values, fields)
    hints = typing.get_type_hints(cls)
    checked = {key: _checked(where, f"{table}.{key}", hints[key], value) for key, value in values.items()}

    def make(values: Mapping[str, Any]) -> T:
        made = cls(**values)
        check(made)
        return made

    try:
        return make(checked)
    except _FOREIGN as error:
        key = _offending_key(make, checked)
        place = f"{table}.{key} = {values[key]!r}" if key else f"[{table}]"
        reason = f"unknown: {error}" if isinstance(error, KeyError) else first_line(error)
        raise ConfigError(f"{where}: {place}: {reason}") from error


def _offending_key(make: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]) -> str | None:
    """Return the last key without which `make` succeeds, or None."""
    for key in reversed(list(values)):
        try:
            make({other: value for other, value in values.items() if other != key})
        except _FOREIGN:
            continue
        return key
    return None


def _checked(where: str, key: str, hint: Any, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"{where}: {key} = {value!r}: {problem[:1].lower()}{problem[1:]}") from None
