"""The configuration of `zsl-train`: that it is read as it was written, and that what cannot run is refused at once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainingArguments

from zsl.errors import ConfigError
from zsl.training.config.config import TrainConfig, TrainerExtras, read_config
from zsl.training.config.peft_table import peft_config
from zsl.training.config.third_party import make_foreign
from zsl.training.config.unknown_keys import OTHER_NAMES


def printed_and_read(directory: Path, **tables: dict[str, Any]) -> tuple[Any, Any]:
    """A configuration with these tables, and what is read from it as it is printed."""
    config = read_config(None, overrides=tables)
    file = directory / "printed.toml"
    file.write_text(config.as_toml(), encoding="utf-8")
    return config, read_config(file, overrides={})


# --- as TOML ---------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
FOREIGN = st.dictionaries(TEXTS, VALUES, max_size=4)


@given(peft=FOREIGN, train=FOREIGN, name=TEXTS, seconds=st.floats(0.1, 1000))
def test_any_configuration_is_read_again_as_it_was_printed(
    tmp_path_factory: pytest.TempPathFactory, peft: dict[str, Any], train: dict[str, Any], name: str, seconds: float
) -> None:
    trunk = {"server_key": name, "request_timeout_seconds": seconds}
    config, again = printed_and_read(
        tmp_path_factory.getbasetemp(), model={"name": name}, trunk=trunk, peft=peft, train=train
    )
    assert again == config


def test_keys_that_are_no_words_are_printed_in_quotes(tmp_path: Path) -> None:
    pattern = {"model.layers.0.q_proj": 4, "^h.1": 2, "plain-word_1": 1, "": 0}
    config, again = printed_and_read(tmp_path, peft={"rank_pattern": pattern, "a key": float("inf")})
    assert again == config and again.peft["rank_pattern"] == pattern
    assert '"^h.1" = 2, plain-word_1 = 1' in config.as_toml()
    assert "nan" in read_config(None, settings=["train.learning_rate=nan"], overrides={}).as_toml()


def test_what_would_end_a_printed_line_is_printed_as_its_number() -> None:
    config = read_config(None, overrides={"train": {"run_name": "a\u2028b\x85c\x7f\N{HOT BEVERAGE}語"}})
    assert r'run_name = "a\u2028b\u0085c\u007f☕語"' in config.as_toml().splitlines()


def test_a_token_is_not_printed(tmp_path: Path) -> None:
    config, again = printed_and_read(tmp_path, train={"hub_token": "hf_secret", "run_name": "a"})
    assert config.trainer_arguments["hub_token"] == "hf_secret"
    assert "hub_token" not in config.as_toml() and "hf_secret" not in config.as_toml()
    assert again.train == {key: value for key, value in config.train.items() if key != "hub_token"}


def test_a_setting_that_reads_as_a_date_is_a_text() -> None:
    for text in ("2024-05-01", "07:32:00", "2024-05-01T07:32:00Z"):
        assert read_config(None, settings=[f"train.run_name={text}"], overrides={}).train["run_name"] == text


def test_a_date_in_a_file_is_refused_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for table, text, key in (
        ("train", "run_name = 2024-05-01", "train.run_name"),
        ("peft", "rank_pattern = {a = [1, 07:32:00]}", "peft.rank_pattern.a"),
    ):
        file.write_text(f"[{table}]\n{text}\n")
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: {key}\b.* date .*quotes$"):
            read_config(file, overrides={})


def test_a_file_with_tables_within_each_other_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.toml"
    for text in ("x = " + "[" * 5000 + "]" * 5000, "[peft." + ".".join(["a"] * 5000) + "]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"{file}: .*TOML"):
            read_config(file, overrides={})


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[data]\nsamples = 3\n", encoding="utf-8-sig")
    assert read_config(file, overrides={}).data.samples == 3


@pytest.mark.parametrize("text", ["model = 'gpt2'", "[[model]]\nname = 'gpt2'", "peft = 3"])
@pytest.mark.parametrize("overrides", [{}, {"model": {"name": "gpt2"}, "peft": {"r": 3}}], ids=["file", "option"])
def test_what_is_no_table_is_refused_with_the_file(text: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: (model|peft) .*table\b"):
        read_config(file, overrides=overrides)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("peft.rank", "peft.r"),
        ("peft.alpha", "peft.lora_alpha"),
        ("peft.dropout", "peft.lora_dropout"),
        ("train.lr", "train.learning_rate"),
        ("train.epochs", "train.num_train_epochs"),
        ("train.batch_size", "train.per_device_train_batch_size"),
        ("data.batch_size", "train.per_device_train_batch_size"),
        ("data.max_seq_length", "data.max_length"),
        ("train.max_length", "data.max_length"),
        ("trunk.server", "trunk.endpoint"),
        ("model.path", "model.name"),
        ("data.path", "data.name"),
        ("train.learning_rat", "train.learning_rate"),
        ("trunk.wire", "trunk.wire_dtype"),
    ],
)
def test_a_key_that_is_called_otherwise_elsewhere_is_told_by_its_name_here(written: str, meant: str) -> None:
    table, _, key = written.partition(".")

    def checked() -> None:
        config = read_config(None, overrides={table: {key: 1}})
        make_foreign(TrainingArguments, "the command line", "train", config.trainer_arguments)
        peft_config("the command line", config.peft)

    with pytest.raises(ConfigError) as raised:
        checked()
    assert re.findall(r"\b[a-z]+\.\w+", str(raised.value)) == [written, meant]


def test_a_key_or_table_that_is_like_no_other_is_told_all_there_are() -> None:
    for overrides, known in (
        ({"model": {"zzz": 1}}, ["dtype", "name", "quantize"]),
        ({"zzz": {}}, ["[model]", "[peft]"]),
    ):
        with pytest.raises(ConfigError) as raised:
            read_config(None, overrides=overrides)
        assert [name for name in known if name not in str(raised.value)] == []


def test_every_key_that_has_other_names_is_one() -> None:
    known = {
        "peft": {field.name for field in dataclasses.fields(LoraConfig)} | {"method"},
        "train": {field.name for field in dataclasses.fields(TrainingArguments)} | TrainerExtras.model_fields.keys(),
        **{name: TrainConfig.model_fields[name].annotation.model_fields for name in ("model", "trunk", "data")},  # type: ignore[union-attr]
    }
    for meant, others in OTHER_NAMES.items():
        table, _, key = meant.partition(".")
        assert key in known[table], meant
        assert not set(known[table]).intersection(others) - {"peft_type"}, meant  # which peft_table refuses


def test_a_key_of_lora_is_not_named_where_the_method_has_none() -> None:
    with pytest.raises(ConfigError) as raised:
        peft_config("here", {"method": "ia3", "dropout": 0.1})
    assert "lora_dropout" not in str(raised.value) and "peft.dropout" in str(raised.value)


# --- [train] ---------------------------------------------------------------------------------------------------

PATIENCE = "train.early_stopping_patience=2"
VALIDATION = "data.validation=0.25"


def read(*settings: str) -> dict[str, Any]:
    return read_config(None, settings=settings, overrides={}).train


@pytest.mark.parametrize("keeping", [PATIENCE, "train.load_best_model_at_end=true"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ("steps", 20, "steps", 20)),
        (["train.save_steps=5"], ("steps", 5, "steps", 5)),
        (["train.save_strategy=epoch"], ("epoch", 20, "epoch", 20)),
        (["train.save_strategy=best"], ("best", 20, "epoch", None)),
        (["train.save_strategy=best", "train.eval_strategy=steps", "train.eval_steps=3"], ("best", 20, "steps", 3)),
        (["train.eval_strategy=epoch"], ("epoch", 20, "epoch", 20)),
        (["train.eval_steps=3"], ("steps", 3, "steps", 3)),
        (["train.eval_steps=3", "train.save_steps=6"], ("steps", 6, "steps", 3)),
    ],
    ids=str,
)
def test_where_the_best_is_kept_validations_and_checkpoints_go_together_as_transformers_wants_it(
    keeping: str, settings: list[str], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    config = read_config(
        None, settings=[VALIDATION, keeping, *settings], overrides={"train": {"output_dir": str(tmp_path)}}
    )
    arguments = make_foreign(TrainingArguments, "here", "train", config.trainer_arguments)
    assert arguments.load_best_model_at_end and arguments.metric_for_best_model == "loss"
    keys = ("save_strategy", "save_steps", "eval_strategy", "eval_steps")
    assert tuple(getattr(arguments, key) for key in keys) == expected


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([PATIENCE], r"early_stopping_patience .* data\.validation"),
        (["train.load_best_model_at_end=true"], r"load_best_model_at_end .* data\.validation"),
        ([VALIDATION, PATIENCE, "train.save_strategy=no"], r"early_stopping_patience .* train\.save_strategy"),
        ([VALIDATION, PATIENCE, "train.eval_strategy=no"], r"early_stopping_patience .* train\.eval_strategy"),
        (
            [VALIDATION, "train.load_best_model_at_end=true", "train.save_strategy=no"],
            r"load_best_model_at_end .* train\.save_strategy",
        ),
        (["train.save_strategy=best"], r'save_strategy = "best" .* data\.validation'),
        ([VALIDATION, "train.metric_for_best_model=accuracy"], r"'accuracy'.* loss and perplexity"),
        (["train.auto_find_batch_size=true"], r"auto_find_batch_size .* train\.per_device_train_batch_size"),
        (["train.overlap=2"], r"overlap = 2, .*gradient_accumulation_steps = 1"),
        (["train.overlap=4", "train.gradient_accumulation_steps=3"], r"overlap = 4, .*_accumulation_steps = 3"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_so_is_refused_before_anything_is_loaded(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^the command line: train\..*{reason}"):
        read(*settings)


def test_what_can_be_trained_is_not_refused() -> None:
    assert read("train.overlap=3", "train.gradient_accumulation_steps=3")["overlap"] == 3
    assert read("train.auto_find_batch_size=false", "train.save_strategy=no", "train.load_best_model_at_end=false")
    not_kept = read(VALIDATION, PATIENCE, "train.load_best_model_at_end=false", "train.save_strategy=no")
    assert (not_kept["eval_strategy"], not_kept["metric_for_best_model"]) == ("epoch", "loss")


# --- defaults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "train", "interval"),
    [
        ("streaming = true", "", ("steps", 20)),  # all of a stream is one epoch
        ("streaming = true", "save_steps = 7", ("steps", 20)),
        ("streaming = true", "eval_strategy = 'epoch'", ("epoch", None)),
        ("streaming = true\nsamples = 5", "", ("epoch", None)),
        ("", "", ("epoch", None)),
        ("", "eval_strategy = 'steps'", ("steps", 20)),  # Trainer would take logging_steps, which is 1 here
        ("", "eval_strategy = 'steps'\neval_steps = 3", ("steps", 3)),
        ("", "eval_steps = 3", ("steps", 3)),
    ],
)
def test_how_often_is_validated(data: str, train: str, interval: tuple[str, int | None], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[data]\nname = 'a/b'\nvalidation = 'test'\n{data}\n[train]\n{train}\n")
    read = read_config(file, overrides={}).train
    assert (read["eval_strategy"], read.get("eval_steps")) == interval


def test_a_validation_of_0_is_none(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[data]\nvalidation = 0.1\n")
    config = read_config(file, settings=["data.validation=0"], overrides={})
    assert config.data.validation is None and "eval_strategy" not in config.train
