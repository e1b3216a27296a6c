"""Tables whose keys are another library's: checked by the fields and types of its own class, and made into that."""

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
    """`cls(**values)` of a dataclass `cls`, which `check` raises no error for.

    `where` (a file) and `table` say in an error where a value stands. A value that another type stands for (`"2e-4"`
    for a float) becomes one. Raises `ConfigError`, which names the key that is to blame where one is.
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
        key = _to_blame(make, checked)
        place = f"{table}.{key} = {values[key]!r}" if key else f"[{table}]"
        reason = f"unknown: {error}" if isinstance(error, KeyError) else first_line(error)
        raise ConfigError(f"{where}: {place}: {reason}") from error


def _to_blame(make: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]) -> str | None:
    """The last key without which there is no error."""
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
