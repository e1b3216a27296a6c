"""The page docs/configuration.md, the reference of the TOML file, from its schema.

python -m support.configuration_page > ../docs/configuration.md            in tests/
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from zsl.training.config.config import (
    PEFT_DEFAULTS,
    WITHOUT_A_FILE,
    ModelTable,
    TrainerExtras,
    TrunkTable,
)
from zsl.training.config.data_table import DataTable
from zsl.training.config.schema_base import Table
from zsl.training.config.train_table import TRAIN_DEFAULTS, WITH_VALIDATION

HEAD = """\
# The configuration of zsl-train

<!-- Made by tests/support/configuration_page.py; tests/test_docs.py holds it. -->

A TOML file with five tables, all of them optional. `--set table.key=value` wins over the file, and the other options of
the command line (`--server`, `--lr`, …) win over both. An unknown key is an error that names the one that was probably
meant, or all keys of a short table. `zsl-train --dry-run` checks all of it, reaches the trunk, and shows the
configuration as it would be used.

"""
PEFT = """\
## `[peft]`

`method` is a method of PEFT, by default `{method}`: `lora`, `ia3`, `loha`, `lokr`, `prompt_tuning`, … All other keys
are those of that method's configuration class (`LoraConfig`, `IA3Config`, …), which PEFT documents. DoRA is
`method = "lora"` with `use_dora = true`, rsLoRA the same with `use_rslora = true`. A method that cannot work through a
trunk is refused with a reason.

`layers` (`--adapt` on the command line) names the layers that adapters are put on: `client`, the default, those of this
process; `all`, the trunk's too. LoRA, DoRA or IA³ on the trunk's layers is sent to the daemon in each step, and its
gradients come back; other methods are for `client`. [guide.md](guide.md#which-layers-to-adapt) has the price and the
gain.

`adapter` continues the training of an existing adapter, and is then the only key besides `layers`: the directory of a
run or of an adapter, or a hub id. On the command line that is `--adapter`. Steps, optimizer and learning rate begin
anew; to resume an interrupted run, leave it out.

"""
TRAIN = """\
## `[train]`

The keys of transformers' `TrainingArguments`, which transformers documents, and these that zsl adds:

"""
DEFAULTS = """\
The defaults of `zsl-train`:

```toml
{train}
```

More with `data.validation`:

```toml
{validation}
```

With `load_best_model_at_end` or `early_stopping_patience`, validations and checkpoints have the same interval. Without
a file:

```toml
{without}
```
"""


def toml_reference() -> str:
    """Return the text of docs/configuration.md."""
    parts = [HEAD]
    tables: dict[str, type[Table]] = {"model": ModelTable, "trunk": TrunkTable, "data": DataTable}
    for name, table in tables.items():
        parts.append(f"## `[{name}]`\n\n{_first_sentence(table, name)}\n\n{_rows(table)}\n")
    parts.append(PEFT.format(**PEFT_DEFAULTS))
    parts.append(f"{TRAIN}{_rows(TrainerExtras)}\n")
    parts.append(
        DEFAULTS.format(
            train=_code(TRAIN_DEFAULTS),
            validation=_code(WITH_VALIDATION),
            without="\n".join(_code(values, table) for table, values in WITHOUT_A_FILE.items()),
        )
    )
    return "".join(parts)


def _first_sentence(table: type[Table], name: str) -> str:
    text = " ".join(str(table.__doc__).split()).removeprefix(f"`[{name}]`: ")
    return text[:1].upper() + text[1:]


def _rows(table: type[Table]) -> str:
    lines = ["| key | meaning | values | default |", "|---|---|---|---|"]
    for name, field in table.model_fields.items():
        lines.append(f"| `{name}` | {field.description} | {_values(field)} | {_default(field)} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    return "none" if field.default is None else f"`{_toml(field.default)}`"


def _values(field: FieldInfo) -> str:
    """Return the type of a key in words, with its bounds."""
    names = {str: "text", int: "a whole number", float: "a number", bool: "true, false"}
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        kinds = [field.annotation]
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [f"`{value}`" for value in get_args(kind)]
        else:
            words.append(names[kind])
    bounds = [
        f"{symbol} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, symbol in (("gt", "&gt;"), ("ge", "≥"), ("lt", "&lt;"), ("le", "≤"))
        if getattr(limit, name, None) is not None
    ]
    return ", ".join(words + bounds)


def _code(values: dict[str, Any], table: str | None = None) -> str:
    prefix = f"{table}." if table else ""
    return "\n".join(f"{prefix}{key} = {_toml(value)}" for key, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


if __name__ == "__main__":
    print(toml_reference(), end="")
