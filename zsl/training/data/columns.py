"""Which column of a data set is learnt from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from datasets import Features, Value

from zsl.errors import DataError
from zsl.training.data.reading import foreign_errors
from zsl.training.data.sources import Documents
from zsl.training.data.table import DataTable

STRINGS = ("string", "large_string", "string_view")
NUMBER = "number"  # of a file that knows text only: learnt where it is asked for
# What a column can be said to hold without a look at its rows: a mix of types, or nothing.
OPEN = ("json", "null")
ROWS_LOOKED_AT = 100


@dataclass(frozen=True, slots=True)
class Column:
    """The column, and whether it holds texts or conversations."""

    name: str
    kind: Literal["text", "messages"]


def column_of(documents: Documents, table: DataTable) -> Column:
    """The column that `table` names, or the one that says it by its name or type.

    Raises `DataError`, which lists the columns, if there is none of that name, if it holds something else, or if
    several could be meant.
    """
    what = documents.described
    types = _types(documents)
    if not types:
        raise DataError(f"{what} has no rows")
    listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    if asked := table.messages_column or table.text_column:
        key, kinds = ("messages_column", ("list",)) if table.messages_column else ("text_column", (*STRINGS, NUMBER))
        if asked not in types:
            raise DataError(f"data.{key} = {asked!r}: {what} has the columns {listed}")
        if types[asked] not in (*kinds, *OPEN):
            wanted = "lists of messages" if table.messages_column else "text"
            raise DataError(f"data.{key} = {asked!r}: the column holds no {wanted}; {what} has the columns {listed}")
        return Column(asked, "messages" if table.messages_column else "text")
    if types.get("messages") in ("list", *OPEN):
        return Column("messages", "messages")
    strings = [name for name, kind in types.items() if kind in STRINGS]
    if types.get("text") in (*STRINGS, NUMBER, *OPEN):
        return Column("text", "text")
    if len(strings) == 1:
        return Column(strings[0], "text")
    if not strings and not {"list", *OPEN}.intersection(types.values()):
        raise DataError(f"{what} has the columns {listed}: none of them holds text or conversations")
    raise DataError(
        f"{what} has the columns {listed}: name the one to learn from with data.text_column or data.messages_column"
    )


def _types(documents: Documents) -> dict[str, str]:
    """Each column's type in a word: the data set's own, or that of its first rows where it has none."""
    what = documents.described
    features: Features | None = documents.rows.features
    of_text = documents.reader in ("csv", "tsv")
    if features is not None and not of_text:
        return {name: _type_of(feature) for name, feature in features.items()}
    with foreign_errors(what, reader=documents.reader, files=documents.files):
        rows: list[dict[str, Any]] = list(islice(documents.rows, ROWS_LOOKED_AT))
    if not rows:
        raise DataError(f"{what} has no rows")
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    return {name: _type_of_texts(values) if of_text else _type_of_values(values) for name, values in columns.items()}


def _type_of_values(values: list[Any]) -> str:
    types = {_type_of_value(value) for value in values if value is not None}
    return types.pop() if len(types) == 1 else "json" if types else "null"


def _type_of_value(value: Any) -> str:
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return f"list of {_type_of_value(value[0])}"
    names = {str: "string", list: "list", dict: "struct", bool: "bool", int: "int64", float: "float64"}
    return names.get(type(value), type(value).__name__)


def _type_of_texts(values: list[str | None]) -> str:
    texts = [value for value in values if value]
    try:
        return NUMBER if [float(text) for text in texts] else "null"
    except ValueError:
        return "string"


def _type_of(feature: Any) -> str:
    if isinstance(feature, Value):
        return str(feature.dtype)
    if isinstance(feature, dict):
        return "struct"
    name = type(feature).__name__
    return {"LargeList": "list", "Sequence": "list"}.get(name, name.lower())
