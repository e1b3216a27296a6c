"""The TOML file of `zsl-train`, checked. Knows no torch.

`[model]`, `[trunk]` and `[data]` have a schema here. `[lora]` and `[train]` go as they are to `LoraConfig` and
`TrainingArguments`, whose documentation is theirs; `zsl.training.run` checks their keys. The one key of `[train]` that
is ours is `overlap`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from zsl.errors import ConfigError
from zsl.training.data.table import DataTable
from zsl.training.table import Table

LONGEST_TIMEOUT_SECONDS = 7 * 24 * 3600.0

# What `[train]` says where the file says nothing.
TRAIN_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 20,  # 4.6 MB and 20 to 100 ms each for GPT-2 small with r = 8
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # transformers hides the progress bar where it says little else
}
LORA_DEFAULTS: dict[str, Any] = {"task_type": "CAUSAL_LM"}


class ModelTable(Table):
    """`[model]`"""

    name: str = "random:gpt2"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TrunkTable(Table):
    """`[trunk]`. Without `endpoint` the trunk runs in the same process, still behind a socket."""

    endpoint: str | None = None
    server_key: str | None = None
    client_key: str | None = None
    mode: Literal["exact", "straight-through", "none"] = "exact"
    cut: str | None = None
    wire_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    deterministic: Literal["packed"] | None = None
    connect_timeout_seconds: float = Field(default=10.0, gt=0, le=LONGEST_TIMEOUT_SECONDS)
    request_timeout_seconds: float = Field(default=300.0, gt=0, le=LONGEST_TIMEOUT_SECONDS)


class TrainConfig(Table):
    """A whole configuration."""

    model: ModelTable = ModelTable()
    trunk: TrunkTable = TrunkTable()
    data: DataTable = DataTable()
    lora: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @property
    def overlap(self) -> int:
        """How many micro-batches of a step are in flight at once. Raises `ConfigError`."""
        overlap = self.train.get("overlap", 1)
        if type(overlap) is not int or overlap < 1:
            raise ConfigError(f"train.overlap = {overlap!r}: a number of micro-batches is needed, 1 or more")
        return overlap

    @property
    def resume_from(self) -> str | bool | None:
        """What `[train]` says of where to start: a checkpoint, whether to, or nothing. Raises `ConfigError`."""
        asked = self.train.get("resume_from_checkpoint")
        if asked is not None and not isinstance(asked, str | bool):
            raise ConfigError(
                f"train.resume_from_checkpoint = {asked!r}: a checkpoint's directory, true or false is needed"
            )
        return asked

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The keys of `[train]` that are those of `TrainingArguments`."""
        return {key: value for key, value in self.train.items() if key != "overlap"}

    def as_toml(self) -> str:
        """The configuration as the TOML that would give it again."""
        lines: list[str] = []
        for table, fields in self.model_dump(exclude_none=True).items():
            lines += ["", f"[{table}]", *(f"{key} = {_toml_value(value)}" for key, value in fields.items())]
        return "\n".join(lines[1:])


def read_config(file: Path, *, settings: Sequence[str] = (), overrides: Mapping[str, Mapping[str, Any]]) -> TrainConfig:
    """The configuration in `file`, with `table.key=value` settings and then `overrides` laid over it.

    Raises `ConfigError`, which names file and key, and for a misspelt key the nearest that there is.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    for setting in settings:
        table, key, value = _parse_setting(setting)
        _lay_over(tables, table, {key: value})
    for table, values in overrides.items():
        _lay_over(tables, table, values)
    tables["lora"] = {**LORA_DEFAULTS, **_table(tables, "lora")}
    tables["train"] = {**TRAIN_DEFAULTS, "output_dir": f"runs/{file.stem}", **_table(tables, "train")}
    try:
        return TrainConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(f"{file}: {_first_problem(error)}") from None


def check_keys(file: Path, table: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises `ConfigError` for the first key that is not known."""
    known = set(known)
    for key in keys:
        if key not in known:
            raise ConfigError(f"{file}: {_unknown_key(f'{table}.{key}', key, known, table)}")


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} is a table: write [{name}] and its keys below it")
    return table


def _lay_over(tables: dict[str, Any], table: str, values: Mapping[str, Any]) -> None:
    tables[table] = {**_table(tables, table), **values}


def _parse_setting(text: str) -> tuple[str, str, Any]:
    path, equals, value = text.partition("=")
    table, dot, key = path.strip().partition(".")
    if not (equals and dot and table and key):
        raise ConfigError(f"--set {text!r}: write table.key=value, for example train.max_steps=5")
    try:
        return table, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return table, key, value.strip()  # a bare word is a string


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":
        return f"{'.'.join(path)}: {problem['msg']}"
    if len(path) == 1:
        return _unknown_key(f"[{path[0]}]", path[0], TrainConfig.model_fields, None)
    schema = TrainConfig.model_fields[path[0]].annotation
    assert isinstance(schema, type) and issubclass(schema, BaseModel)
    return _unknown_key(".".join(path), path[1], schema.model_fields, path[0])


def _unknown_key(shown: str, key: str, known: Iterable[str], table: str | None) -> str:
    kind = "key" if table else "table"
    near = difflib.get_close_matches(key, list(known), n=1)
    if not near:
        return f"unknown {kind} {shown}"
    return f"unknown {kind} {shown}; did you mean {f'{table}.{near[0]}' if table else f'[{near[0]}]'}?"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
