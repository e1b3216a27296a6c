"""Choose the columns of a data set to learn from, by the layouts of TRL and ShareGPT."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from datasets import Features, Value

from zsl.errors import DataError
from zsl.training.config.data_table import DataTable
from zsl.training.data.dataset_errors import foreign_errors
from zsl.training.data.sources import Documents

STRINGS = ("string", "large_string", "string_view")
NUMBER = "number"  # type of a CSV column of numbers: learnt only if its name is `text` or configured
# Types of columns that hold a mix of types, or only missing values.
OPEN = ("json", "null")
ROWS_LOOKED_AT = 100
TEXTS = (*STRINGS, NUMBER, *OPEN)
CONVERSATIONS = ("list", *TEXTS)  # lists of messages, also as JSON text
CONVERSATION_NAMES = ("messages", "conversations")
OF_A_CHAT = ("tools", "chat_template_kwargs")
# Names of known layouts: beside one of these, the only column of strings is not taken for the text.
OF_A_LAYOUT = {*CONVERSATION_NAMES, "prompt", "completion", "completions", "chosen", "rejected"}
NAME_IT = "name the one to learn from with data.text_column or data.messages_column"


@dataclass(frozen=True, slots=True)
class Column:
    """Column to learn from and its kind, the columns read with it, and the unused ones."""

    name: str
    kind: Literal["text", "messages", "completion"]
    beside: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def prompt(self) -> str | None:
        return "prompt" if self.kind == "completion" else None

    def lines(self) -> list[str]:
        """Return a line that names the unused columns, if any."""
        columns = "column" if len(self.unused) == 1 else "columns"
        return [f"not used: {columns} {', '.join(self.unused)}"] if self.unused else []


def column_of(documents: Documents, table: DataTable) -> Column:
    """Choose the column that `table` names, that of a known layout, `text`, or the only column of strings.

    Raises `DataError`, which lists the columns, if the named column is missing or has the wrong type, or if the choice
    is ambiguous.
    """
    what = documents.described
    types = _types(documents)
    if not types:
        raise DataError(f"{what} has no rows")
    listed = f"{what} has the columns " + ", ".join(f"{name} ({kind})" for name, kind in types.items())
    name, kind = _asked(table, types, what, listed) or _known(types, listed)
    others = {"text": (), "messages": OF_A_CHAT, "completion": ("prompt", *OF_A_CHAT)}[kind]
    beside = tuple(other for other in others if other in types)
    return Column(name, kind, beside, tuple(other for other in types if other not in (name, *beside)))


def _asked(
    table: DataTable, types: dict[str, str], what: str, listed: str
) -> tuple[str, Literal["text", "messages"]] | None:
    asked = table.messages_column or table.text_column
    if not asked:
        return None
    of_messages = table.messages_column is not None
    key = "messages_column" if of_messages else "text_column"
    if asked not in types:
        raise DataError(f"data.{key} = {asked!r}: {listed}")
    if types[asked] not in (CONVERSATIONS if of_messages else TEXTS):
        wanted = "lists of messages" if of_messages else "text"
        raise DataError(f"data.{key} = {asked!r}: the column holds no {wanted}; {listed}")
    return asked, "messages" if of_messages else "text"


def _known(types: dict[str, str], listed: str) -> tuple[str, Literal["text", "messages", "completion"]]:
    for name in CONVERSATION_NAMES:
        if types.get(name) in CONVERSATIONS:
            return name, "messages"
    if "chosen" in types and "rejected" in types:
        raise DataError(f"{listed}: chosen and rejected are preferences, which are not learnt; {_chosen(types)}")
    if types.get("prompt") in CONVERSATIONS and types.get("completion") in CONVERSATIONS:
        if types.get("label") == "bool":
            raise DataError(
                f"{listed}: the label says which completions are good, and all would be learnt; write those that are "
                "to be learnt to a file without it"
            )
        return "completion", "completion"
    if types.get("text") in TEXTS:
        return "text", "text"
    strings = [name for name, kind in types.items() if kind in STRINGS]
    could_hold_more = [kind for kind in types.values() if kind in ("json", "struct") or kind.startswith("list")]
    if len(strings) == 1 and not could_hold_more and not types.keys() & OF_A_LAYOUT:
        return strings[0], "text"
    if not strings and not could_hold_more and "null" not in types.values():
        raise DataError(f"{listed}: none of them holds text or conversations")
    raise DataError(f"{listed}: {NAME_IT}")


def _chosen(types: dict[str, str]) -> str:
    """Return the advice for a data set of preferences."""
    if "prompt" in types:
        return "to learn the chosen answers, rename chosen to completion and leave rejected out"
    key = "messages_column" if types["chosen"] == "list" else "text_column"
    return f'to learn the chosen ones, set data.{key} = "chosen"'


def _types(documents: Documents) -> dict[str, str]:
    """Return each column's type: the declared one, or else that of the first rows."""
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
    """Return the name of a column's declared type."""
    if isinstance(feature, Value):
        return str(feature.dtype)
    if isinstance(feature, dict):
        return "struct"
    name = type(feature).__name__
    if name not in ("List", "LargeList", "Sequence"):
        return name.lower()
    held = getattr(feature.feature, "dtype", "null") if isinstance(feature.feature, Value) else "null"
    return "list" if held == "null" else f"list of {held}"


def without_filled(value: Any, feature: Any) -> Any:
    """Remove, at any depth, keys with None: an Arrow struct has the keys of all rows."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: without_filled(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [without_filled(item, feature.feature) for item in value]
    return value
