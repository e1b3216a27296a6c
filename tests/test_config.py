"""The configuration of `zsl-train`: that it is read as it was written, and that what cannot run is refused at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import ConfigError
from zsl.training.config import read_config


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
    config, read = printed_and_read(
        tmp_path_factory.getbasetemp(), model={"name": name}, trunk=trunk, peft=peft, train=train
    )
    assert read == config


def test_keys_that_are_no_words_are_printed_in_quotes(tmp_path: Path) -> None:
    pattern = {"model.layers.0.q_proj": 4, "^h.1": 2, "plain-word_1": 1, "": 0}
    config, read = printed_and_read(tmp_path, peft={"rank_pattern": pattern, "a key": float("inf")})
    assert read == config and read.peft["rank_pattern"] == pattern
    assert '"^h.1" = 2, plain-word_1 = 1' in config.as_toml()
    assert "nan" in read_config(None, settings=["train.learning_rate=nan"], overrides={}).as_toml()


def test_what_would_end_a_printed_line_is_printed_as_its_number() -> None:
    config = read_config(None, overrides={"train": {"run_name": "a\u2028b\x85c\x7f\N{HOT BEVERAGE}語"}})
    assert r'run_name = "a\u2028b\u0085c\u007f☕語"' in config.as_toml().splitlines()


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
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: {key}\b.* is a date or a time, .*quotes$"):
            read_config(file, overrides={})
