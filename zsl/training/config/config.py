"""Read and check the configuration of `zsl-train` from a TOML file and the command line.

`[model]`, `[trunk]` and `[data]` have a schema. `[peft]` is passed to the PEFT configuration class of its `method`, and
`[train]` to `TrainingArguments`: `third_party.py` checks their keys, and those libraries document them.
`TrainerExtras` are the keys of `[train]` that zsl adds; the defaults are in `train_table.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from zsl.errors import ConfigError
from zsl.files.small_files import parse_toml, read_toml
from zsl.models.dtypes import DtypeName
from zsl.training.config.data_table import DataTable
from zsl.training.config.schema_base import Table
from zsl.training.config.toml_text import toml_line
from zsl.training.config.train_table import check_together, with_defaults
from zsl.training.config.unknown_keys import unknown_key, unknown_table

LONGEST_TIMEOUT_SECONDS = 7 * 24 * 3600.0

# Keys of `[peft]` that zsl adds.
ADAPTER = "adapter"
LAYERS = "layers"
AdaptedLayers = Literal["client", "all"]  # as `load_client` takes them
PEFT_DEFAULTS: dict[str, Any] = {"method": "lora"}
# Settings of a run without a configuration file.
WITHOUT_A_FILE: dict[str, dict[str, Any]] = {
    "data": {"samples": 20},
    "peft": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "train": {"output_dir": "lora_checkpoints", "seed": 0},
}

_JSON = (str, int, float, list, dict)  # TOML's types except dates and times


class ModelTable(Table):
    """`[model]`: the model, and the dtype of the client's layers."""

    name: str = Field(
        default="random:gpt2",
        description="A hub id, a checkpoint's directory, the client's part that `zsl split` made, a `.gguf` file, "
        "`package:<name>`, or `random:<model_type>`.",
    )
    dtype: DtypeName = Field(default="float32", description="The dtype of bottom and top.")
    quantize: Literal["4bit", "8bit"] | None = Field(
        default=None, description="The linear layers of bottom and top in 4 or 8 bits; needs bitsandbytes."
    )


class TrunkTable(Table):
    """`[trunk]`: the trunk's address, and how the client uses it."""

    endpoint: str | None = Field(
        default=None,
        description="`HOST:PORT` of a daemon, or a comma-separated list of daemons of the same trunk. Without it, "
        "a daemon is started for this run, and ends with it.",
    )
    server_key: str | None = Field(default=None, description="The daemon's `.key` file, or the key itself.")
    client_key: str | None = Field(default=None, description="The client's `.key_secret` file.")
    mode: Literal["exact", "straight-through", "none"] = Field(
        default="exact", description="The gradient for the layers in front of the trunk."
    )
    cut: str | None = Field(
        default=None,
        coerce_numbers_to_str=True,
        description="`START:STOP`, the trunk's layers. A daemon that serves other layers is refused; without it, the "
        "daemon's layers are used.",
    )
    wire_dtype: DtypeName | None = Field(
        default=None, description="The dtype of activations and gradients on the wire; without it, the model's dtype."
    )
    adapter_wire_dtype: DtypeName | None = Field(
        default=None,
        description="The dtype of adapters on the trunk's layers, and of their gradients, on the wire; without it, "
        "their own.",
    )
    deterministic: Literal["packed"] | None = Field(
        default=None, description="`packed`: refuse a daemon whose answers may depend on its other clients' requests."
    )
    padding: Literal["drop", "send"] = Field(
        default="drop",
        description="`send`: send padding too, so that a padded batch gives the local model's results bit for bit.",
    )
    connect_timeout_seconds: float = Field(
        default=10.0,
        gt=0,
        le=LONGEST_TIMEOUT_SECONDS,
        description="The longest time for the first connection; for a daemon that is still loading, "
        "`request_timeout_seconds` applies.",
    )
    request_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        le=LONGEST_TIMEOUT_SECONDS,
        description="The longest time for a request, including replays and outages of the daemon.",
    )


class TrainerExtras(Table):
    """Keys of `[train]` that zsl adds to those of `TrainingArguments`."""

    overlap: int = Field(
        default=1,
        ge=1,
        strict=True,
        description="The number of micro-batches (of `gradient_accumulation_steps`) in flight at once; the gradient "
        "is the same.",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after this many validations in a row without improvement."
    )
    early_stopping_threshold: float = Field(
        default=0.0, ge=0, description="The smallest decrease of the validation loss that counts as an improvement."
    )
    sample_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="A text that the model continues, with its most probable tokens, before the training, at each "
        "validation, and after it.",
    )


class TrainConfig(Table):
    """The whole configuration: one field for each table."""

    model: ModelTable = ModelTable()
    trunk: TrunkTable = TrunkTable()
    data: DataTable = DataTable()
    peft: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @property
    def extras(self) -> TrainerExtras:
        """The keys of `[train]` that zsl adds. Raises `ValidationError`, which `read_config` has ruled out."""
        return TrainerExtras.model_validate({k: v for k, v in self.train.items() if k in TrainerExtras.model_fields})

    @property
    def adapter(self) -> str | None:
        """The adapter to start from (a directory or a hub id), or None. Raises `ConfigError`."""
        named = self.peft.get(ADAPTER)
        if named is not None and not (isinstance(named, str) and named):
            raise ConfigError(f"peft.{ADAPTER} = {named!r}: a directory, or a hub id, is needed")
        return named

    @property
    def layers(self) -> AdaptedLayers:
        """The layers that adapters are put on: those of the client, or all."""
        return self.peft.get(LAYERS, "client")  # type: ignore[no-any-return]

    @property
    def resume_from(self) -> str | bool | None:
        """The value of `train.resume_from_checkpoint`: a path, a bool or None. Raises `ConfigError`."""
        asked = self.train.get("resume_from_checkpoint")
        if asked is not None and not isinstance(asked, str | bool):
            raise ConfigError(
                f"train.resume_from_checkpoint = {asked!r}: a checkpoint's directory, true or false is needed"
            )
        return asked

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The keys of `[train]` for `TrainingArguments`, without `resume_from_checkpoint`."""
        ours = {*TrainerExtras.model_fields, "resume_from_checkpoint"}
        return {key: value for key, value in self.train.items() if key not in ours}

    def as_toml(self) -> str:
        """Return the configuration as TOML text for logs, without secrets."""
        lines: list[str] = []
        for table, fields in self.model_dump(exclude_none=True).items():
            shown = {key: value for key, value in fields.items() if not key.endswith("_token")}
            lines += ["", f"[{table}]", *(toml_line(key, value) for key, value in shown.items())]
        return "\n".join(lines[1:])


def read_config(
    file: Path | None, *, settings: Sequence[str] = (), overrides: Mapping[str, Mapping[str, Any]]
) -> TrainConfig:
    """Read the configuration in `file`, overridden by `table.key=value` settings and then by `overrides`.

    Without a file, it describes a small run on synthetic data. Raises `ConfigError`, which names file and key, and for
    a misspelt key the nearest known one.
    """
    where = where_of(file)
    tables = _read(file) if file else {}
    for name in TrainConfig.model_fields:
        _table(where, tables, name)
    for setting in settings:
        table, key, value = _parse_setting(setting)
        _lay_over(where, tables, table, {key: value})
    _refuse_dates(where, "", tables)
    for table, values in overrides.items():
        _lay_over(where, tables, table, values)
    peft = _table(where, tables, "peft")
    if peft.get(LAYERS, "client") not in get_args(AdaptedLayers):
        raise ConfigError(
            f"{where}: peft.{LAYERS} = {peft[LAYERS]!r}: {' or '.join(get_args(AdaptedLayers))} is needed"
        )
    if ADAPTER in peft and peft.keys() - {ADAPTER, LAYERS}:
        others = ", ".join(f"peft.{key}" for key in peft if key not in (ADAPTER, LAYERS))
        raise ConfigError(f"{where}: peft.{ADAPTER} goes on from an adapter as that is: leave out {others}, or it")
    tables["peft"] = peft if ADAPTER in peft else {**PEFT_DEFAULTS, **peft}
    for table, values in {} if file else WITHOUT_A_FILE.items():
        if table != "peft" or tables["peft"].get("method") == "lora":  # those defaults are keys of LoRA
            tables[table] = {**values, **_table(where, tables, table)}
    data = _table(where, tables, "data")
    validates, streams = bool(data.get("validation")), bool(data.get("streaming")) and data.get("samples") is None
    output_dir = f"runs/{file.stem}" if file else None
    tables["train"] = with_defaults(
        _table(where, tables, "train"), output_dir=output_dir, validates=validates, streams=streams
    )
    try:
        config = TrainConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error)}") from None
    try:
        overlap = config.extras.overlap
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{where}: train.{problem['loc'][0]} = {problem['input']!r}: {problem['msg']}") from None
    check_together(where, config.train, overlap=overlap, validates=validates)
    return config


def where_of(file: Path | None) -> str:
    """Return the name of the configuration's source for error texts."""
    return str(file) if file else "the command line"


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_toml(file, regular=False)  # a shell's <(…) is a pipe
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def _table(where: str, tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {name} is a table: write [{name}] and its keys below it")
    return table


def _lay_over(where: str, tables: dict[str, Any], table: str, values: Mapping[str, Any]) -> None:
    tables[table] = {**_table(where, tables, table), **values}


def _parse_setting(text: str) -> tuple[str, str, Any]:
    path, equals, value = text.partition("=")
    table, dot, key = path.strip().partition(".")
    if not (equals and dot and table and key):
        raise ConfigError(f"--set {text!r}: write table.key=value, for example train.max_steps=5")
    try:
        read = parse_toml(f"value = {value}")["value"]
    except ConfigError:
        return table, key, value.strip()  # a bare word is a string
    return table, key, read if isinstance(read, _JSON) else value.strip()


def _refuse_dates(where: str, path: str, value: Any) -> None:
    """Raise `ConfigError` for a TOML date or time: no key accepts one, and `run.json` cannot hold one."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_dates(where, f"{path}.{key}" if path else key, item)
    elif isinstance(value, list):
        for item in value:
            _refuse_dates(where, path, item)
    elif not isinstance(value, _JSON):
        raise ConfigError(f"{where}: {path}: {value} is a date or a time, and a text is needed: put it in quotes")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":
        return f"{'.'.join(path)}: {problem['msg']}"
    if len(path) == 1:
        if path[0] == "lora":
            return 'unknown table [lora]; write [peft] with method = "lora", the default'
        return unknown_table(path[0], TrainConfig.model_fields)
    schema = TrainConfig.model_fields[path[0]].annotation
    assert isinstance(schema, type) and issubclass(schema, BaseModel)
    return unknown_key(path[0], path[1], schema.model_fields)
