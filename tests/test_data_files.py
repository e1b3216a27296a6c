"""Local files of data: each row and value as it is written, or an error with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from datasets import Dataset

from support.data import SENTENCES, conversation, write_model
from support.models import VOCABULARY
from zsl.errors import ConfigError, DataError, StartupError
from zsl.models.reference import ModelReference, resolve
from zsl.training.config.data_table import DataTable
from zsl.training.data.load import TrainingData, load_data

TEXTS = SENTENCES[:3]
# What pandas takes for missing, and pyarrow or pandas for something else than a text.
WORDS = ["NA", "null", "None", "nan", "n/a", "NULL", "007", "1e5", "True", "2020-01-01", "-0", "1.50"]

SEMICOLONS = """---
configs:
- config_name: default
  data_files: words.csv
  sep: ";"
  header: null
  names: [other, word]
---
"""


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelReference:
    """With a tokenizer that writes any character."""
    path = write_model(tmp_path_factory.mktemp("model"))
    tokenizer = resolve(str(path)).tokenizer()
    tokenizer.add_tokens(sorted({letter for word in WORDS for letter in word}))
    tokenizer.save_pretrained(path)
    return resolve(str(path))


@pytest.fixture
def load(model: ModelReference) -> Callable[..., TrainingData]:
    def loaded(name: str | Path, **keys: Any) -> TrainingData:
        return load_data(DataTable(name=str(name), **{"max_length": 32, "packing": False, **keys}), model)

    return loaded


@pytest.fixture
def learnt(load: Callable[..., TrainingData], model: ModelReference) -> Callable[..., list[str]]:
    """The texts of a data set, as they are learnt."""

    def read(name: str | Path, **keys: Any) -> list[str]:
        tokenizer = model.tokenizer()
        rows = load(name, **keys).train
        return [str(tokenizer.decode(row["input_ids"])).removesuffix("<eos>") for row in rows]

    return read


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(file: Path, columns: dict[str, list[str]]) -> Path:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return file


def test_a_suffix_counts_in_any_case_and_behind_it_that_of_a_compression(
    learnt: Callable[..., list[str]], tmp_path: Path
) -> None:
    lines = json_lines([{"text": text} for text in TEXTS]).encode()
    table = "".join(f"{line}\r\n" for line in ("text", *TEXTS)).encode()
    for name in ("a.JSONL", "b.ndjson", "c.jsonlines"):
        (tmp_path / name).write_bytes(lines)
    (tmp_path / "d.CSV").write_bytes(table)
    (tmp_path / "e.Tsv").write_bytes(table)
    (tmp_path / "f.json").write_text(json.dumps(TEXTS))
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    (tmp_path / "h.JSON.bz2").write_bytes(bz2.compress(lines))
    (tmp_path / "i.csv.xz").write_bytes(lzma.compress(table))
    with pa.output_stream(tmp_path / "j.jsonl.zst", compression="zstd") as file:
        file.write(lines)
    Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "k.PARQUET")
    for file in sorted(tmp_path.iterdir()):
        assert learnt(file) == TEXTS, file
    assert learnt(tmp_path / "[ag].*") == TEXTS * 2, "one kind"
    (tmp_path / "one.TXT").write_text(TEXTS[0])
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    assert learnt(tmp_path / "*.[tT][xX][tT]*") == TEXTS[:2]


@pytest.mark.parametrize("name", ["notes", "rows.xlsx", "rows.jsonl.zip", "rows.parquet.gz", "notes.log"])
def test_a_file_whose_suffix_says_nothing_is_refused(
    load: Callable[..., TrainingData], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(" ".join(SENTENCES))
    with pytest.raises(ConfigError, match=rf"{name}: .*\.txt.*\.jsonl"):
        load(tmp_path / name)


@pytest.mark.parametrize("cut", [-4, 4])
def test_a_damaged_archive_is_an_error_that_names_it(
    load: Callable[..., TrainingData], tmp_path: Path, cut: int
) -> None:
    lines = json_lines([{"text": text} for text in SENTENCES]).encode()
    with pa.output_stream(tmp_path / "rows.zst", compression="zstd") as file:
        file.write(lines)
    for suffix, archive in (
        (".gz", gzip.compress(lines)),
        (".bz2", bz2.compress(lines)),
        (".xz", lzma.compress(lines)),
        (".zst", (tmp_path / "rows.zst").read_bytes()),
    ):
        file = tmp_path / f"rows.jsonl{suffix}"
        file.write_bytes(archive[:cut])
        with pytest.raises(DataError, match=r"rows\.jsonl\.\w+ .*: ."):
            load(file)


@pytest.mark.parametrize("name", ["words.csv", "words.tsv", "words.jsonl", "words.json", "csv", "json"])
def test_every_text_is_learnt_as_it_is_written(
    learnt: Callable[..., list[str]], load: Callable[..., TrainingData], tmp_path: Path, name: str
) -> None:
    """Also where a whole file, or all of the first ones, hold what could be numbers, dates or missing values."""
    for parts in ([WORDS], [[word] for word in WORDS]):
        directory = tmp_path / str(len(parts))
        directory.mkdir()
        suffix = name.rpartition(".")[2]
        for at, words in enumerate(parts):
            file = directory / f"train-{at:02}.{suffix}"
            rows = [{"text": word} for word in words]
            if "json" in suffix:
                file.write_text(json.dumps(rows) if suffix == "json" else json_lines(rows))
            else:
                write_csv(file, {"text": words})
        place = directory / f"*.{suffix}" if "." in name else directory
        assert learnt(place) == WORDS
        assert len(load(place).lines) == 1


def test_texts_of_a_directory_whose_card_says_how_they_are_written_are_as_they_are_written(
    learnt: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(SEMICOLONS)
    (tmp_path / "words.csv").write_text("".join(f"{word};{word}\n" for word in WORDS))
    assert learnt(tmp_path, text_column="word") == WORDS


def test_files_of_a_directory_that_are_not_read_are_named(load: Callable[..., TrainingData], tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "README.md", "a.JSONL"):
        (tmp_path / name).write_text(json_lines([{"text": TEXTS[0]}]) if "json" in name.lower() else "")
    write_csv(tmp_path / "b.csv", {"text": TEXTS})
    said = "split train, without 2 files of rows that no split has: a.JSONL, b.csv, 1 row"
    assert load(tmp_path).lines[0].startswith(f"{tmp_path}, {said}")


def test_what_is_taken_for_numbers_in_csv_is_no_text_unless_it_is_asked_for(
    learnt: Callable[..., list[str]], tmp_path: Path
) -> None:
    file = write_csv(tmp_path / "a.csv", {"id": ["007", "", "1e5"], "question": TEXTS})
    assert learnt(file) == TEXTS
    assert learnt(file, text_column="id") == ["007", "1e5"]


def test_a_json_row_may_lack_columns_and_values_keep_their_types(
    learnt: Callable[..., list[str]], load: Callable[..., TrainingData], tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json_lines([{"id": 1, "text": None}, {"text": "007"}, {"id": "x"}, {"text": TEXTS[0], "more": {}}]))
    assert learnt(file) == ["007", TEXTS[0]]
    assert "2 empty texts left out" in load(file).lines
    file.write_text(json_lines([{"messages": conversation("2020-01-01", "2020-01-02")}]))
    assert "user\n2020-01-01<|im_end|>" in learnt(file)[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "directory"])
def test_a_changed_file_that_keeps_its_time_is_read_anew(
    learnt: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if name == "directory":
        file.mkdir()
        file /= "train.parquet"
    for texts in (TEXTS[:2], TEXTS[1:]):
        if file.suffix == ".parquet":
            Dataset.from_dict({"text": texts}).to_parquet(file)
        elif file.suffix == ".csv":
            write_csv(file, {"text": texts})
        else:
            file.write_text(json_lines([{"text": text} for text in texts]))
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert learnt(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "\\ud83d"}\n', ["line 3", "\\ud83d", "lone surrogate"]),
        ("a.json", '[{"text": "a"},\n{"text": "b", "n": ["\\uDE00"]}]', ["row 2", "\\ude00", "lone surrogate"]),
        ("a.json", '["a", 3]', ["row 2", "int"]),
        ("a.json", '{\n"text": "a"\n}', ["line 1", "a list"]),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', ["line 3", "not JSON"]),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["line 2", "UTF-8"]),
        ("a.jsonl", "[" * 100_000, ["line 1"]),
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "n": 1, "text": "b"}\n', ["line 2", "'text' twice"]),
        ("a.json", '[{"messages": [{"role": "user", "role": "tool"}]}]', ["line 1", "'role' twice"]),
        ("a.csv", "text,n\na,1\nb,2,3\n", ["line 3", "3 fields", "2 columns"]),
        ("a.csv", "text,n\na,1,\nb,2,\n", ["line 2", "3 fields", "2 columns"]),
        ("a.csv", 'text\n"a\nb"\n"c" d\n', ["line 4", "expected"]),
        ("a.csv", 'text\na\n"b\n', ["line 3", "unexpected end"]),
        ("a.csv", "text,text\na,b\n", ["line 1", "'text'"]),
        ("a.csv", b"text\na\n\xe9\n", ["line 3", "UTF-8"]),
        ("a.txt", b"a\n\xe9\n", ["line 2", "UTF-8"]),
        ("a.txt", "a\nb".encode("utf-16-le"), ["line 1", "UTF-8"]),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_read_is_one_line_with_its_file_and_place(
    load: Callable[..., TrainingData], tmp_path: Path, name: str, content: str | bytes, said: list[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load(file)
    assert all(words in str(caught.value) for words in [f"{file}, ", *said])
    assert "\n" not in str(caught.value)


def test_a_cache_folder_that_cannot_be_written_is_named_and_not_the_data(
    load: Callable[..., TrainingData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines([{"text": TEXTS[0]}]))
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(StartupError, match=r"file/cache .*Not a directory.*HF_DATASETS_CACHE"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("keys", [{}, {"packing": True}, {"streaming": True}], ids=str)
def test_a_token_that_the_model_does_not_have_is_named_with_its_row_before_a_step(
    model: ModelReference, tmp_path: Path, keys: dict[str, Any]
) -> None:
    path = write_model(tmp_path)
    tokenizer = resolve(str(path)).tokenizer()
    tokenizer.add_tokens([f"<n{number}>" for number in range(VOCABULARY - len(tokenizer))] + ["<new>"])
    tokenizer.save_pretrained(path)
    file = tmp_path / "a.jsonl"
    file.write_text(json_lines([{"text": text + " <new>" * (at == 2)} for at, text in enumerate(SENTENCES)]))
    table = DataTable(name=str(file), **{"max_length": 32, "packing": False, **keys})
    with pytest.raises(DataError, match=f"'<new>' .*{VOCABULARY}") as caught:
        for _, _ in zip(load_data(table, resolve(str(path))).train, SENTENCES, strict=False):
            pass
    if not keys:
        assert f"{file}, row 3 " in str(caught.value)
    tokenizer.pad_token = "<new>"
    tokenizer.save_pretrained(path)
    file.write_text(json_lines([{"text": SENTENCES[0]}]))
    if not keys:
        with pytest.raises(DataError, match="'<new>'"):
            load_data(table, resolve(str(path)))


def test_rows_that_are_left_out_by_default_or_by_a_limit_are_counted(
    load: Callable[..., TrainingData], tmp_path: Path
) -> None:
    assert load("synthetic", packing=None).lines[1].startswith("20 rows, as data.samples")
    (tmp_path / "a.jsonl").write_text(json_lines([{"text": text} for text in SENTENCES[:10]]))
    lines = load(tmp_path / "a.jsonl", validation=0.5, validation_samples=2).lines
    assert lines[-1] == "3 rows of that share left out by data.validation_samples"


def test_the_first_rows_of_a_stream_are_counted(load: Callable[..., TrainingData], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines([{"text": text, "id": "1"} for text in [*SENTENCES[:5], " "]]))
    lines = load(tmp_path / "a.jsonl", streaming=True, max_length=4).lines
    assert lines[1:] == [
        "in the first 5 rows: 1 empty text left out",
        "in the first 5 rows: 5 texts cut off at 4 tokens",
        "not used: column id",
    ]


def test_a_stream_is_told_apart_by_the_content_of_its_files(load: Callable[..., TrainingData], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"

    def fingerprint(*texts: str) -> str | None:
        file.write_text(json_lines([{"text": text} for text in texts]))
        os.utime(file, (1, 1))
        return load(file, streaming=True).fingerprint

    assert fingerprint("the fox", "the owl") == fingerprint("the fox", "the owl") != fingerprint("the fox", "the elk")
