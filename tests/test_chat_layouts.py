"""Chat rows: the layouts of TRL and ShareGPT, to the tokens and labels that TRL makes of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.data_utils import maybe_convert_to_chatml

from support.data import ANSWERS, MARKED, PLAIN, SENTENCES, conversation, write_model
from support.models import local_model
from support.tokenizer import tiny_tokenizer, words
from zsl.errors import DataError
from zsl.models.reference import ModelReference, resolve
from zsl.text.plural import counted
from zsl.training.config.data_table import DataTable
from zsl.training.data.answer_tokens import conversation_encoder
from zsl.training.data.conversations import Conversation, messages_of
from zsl.training.data.load import TrainingData, load_data
from zsl.training.data.rows import NO_LABEL

# As those that write tools, calls and a variable of the row; a call, as an answer, is marked.
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if the %}{{ 'the ' + the }}{% endif %}"
    + MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgen",
        "{{ m['content'] or '' }}{{ m['tool_calls'] | tojson if m['tool_calls'] else '' }}{{ '<|im_end|>' }}{% endgen",
    )
)
# Writes what it is given, be it a list; takes contents in parts too; takes no others.
CONTENT, PARTS = "{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' }}{% endfor %}"
AS_GIVEN = PLAIN.replace("+ m['content'] +", f"}}}}{CONTENT}{{{{")
ONLY_PARTS = AS_GIVEN.replace(CONTENT, PARTS)
IN_PARTS = AS_GIVEN.replace(CONTENT, f"{{% if m['content'] is string %}}{CONTENT}{{% else %}}{PARTS}{{% endif %}}")
CHAT = [{"role": "system", "content": SENTENCES[0]}, *conversation(SENTENCES[1], ANSWERS[0])]
LONG = [*CHAT, *conversation(SENTENCES[2], ANSWERS[1])]
TOOL = {"type": "function", "function": {"name": "moon", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "moon", "arguments": {"animal": "fox"}}}
CALLS = [
    CHAT[1],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "the moon"},
    {"role": "assistant", "content": ANSWERS[0]},
]
END = "<|im_end|>"


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def with_positions(model: Path) -> Path:
    """A row of tools has more tokens than the tiny models take."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelReference]:
    """A tiny model whose tokenizer has this chat template, made once for each."""
    made: dict[str | None, ModelReference] = {}

    def model(template: str | None = MARKED) -> ModelReference:
        if template not in made:
            made[template] = resolve(str(with_positions(write_model(tmp_path_factory.mktemp("model"), template))))
        return made[template]

    return model


Load = Callable[..., TrainingData]


@pytest.fixture
def load(model: Callable[..., ModelReference], tmp_path: Path) -> Load:
    def loaded(rows: list[dict[str, Any]], template: str | None = MARKED, **keys: Any) -> TrainingData:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_data(DataTable(name=str(file), **{"max_length": 512, **keys}), model(template))

    return loaded


def tokens_and_labels(rows: Any) -> list[tuple[list[int], list[int]]]:
    return [tuple([int(n) for n in row[column]] for column in ("input_ids", "labels")) for row in rows]  # type: ignore[misc]


def learnt(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode([n for n in labels if n != NO_LABEL]) for _, labels in tokens_and_labels(data.train)]


def by_trl(model: ModelReference, rows: list[dict[str, Any]], directory: Path, **keys: Any) -> Dataset:
    """The rows as TRL prepares them, with the loss on completions and, where `keys` say so, on answers only."""
    keys |= {"bf16": False, "activation_checkpointing": False, "use_cpu": True, "report_to": "none"}
    arguments, tokenizer = SFTConfig(str(directory), max_length=None, **keys), model.tokenizer()
    rows = [maybe_convert_to_chatml(row) for row in copy.deepcopy(rows)]
    trainer = SFTTrainer(
        local_model(model.text), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.train_dataset


def sharegpt(messages: list[dict[str, str]], **names: str) -> list[dict[str, str]]:
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": SENTENCES[0]}, {"text": SENTENCES[1] + "<eos>"}],
        [{"prompt": SENTENCES[0], "completion": f" {answer}", "id": answer} for answer in ANSWERS],
        [{"prompt": "the m", "completion": "oon<eos>", "id": "a"}],
        [{"messages": CHAT, "source": "a"}, {"messages": LONG, "source": "b"}],
        [{"conversations": sharegpt(LONG), "id": "a"}],
        [{"prompt": LONG[:at], "completion": LONG[at:], "id": "a"} for at in (2, 3, 4)],
        [{"messages": CALLS, "tools": [TOOL], "chat_template_kwargs": {"the": "owl"}}],
        [{"messages": CALLS, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"the": "owl"}}],
        [{"prompt": CALLS[:1], "completion": CALLS[1:], "tools": [TOOL], "chat_template_kwargs": {"the": "owl"}}],
    ],
    ids=["text", "pair", "merges", "messages", "sharegpt", "completion", "tools", "tools as JSON", "completion, tools"],
)  # fmt: skip
def test_a_row_has_the_tokens_and_labels_that_trl_gives_it(
    load: Load, model: Callable[..., ModelReference], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    is_chat = any(isinstance(value, list) for value in rows[0].values())
    expected = by_trl(model(WITH_TOOLS), rows, tmp_path, assistant_only_loss=is_chat)
    data = load(rows, WITH_TOOLS, packing=False)
    assert tokens_and_labels(data.train) == tokens_and_labels(expected)
    assert all(NO_LABEL in labels for _, labels in tokens_and_labels(data.train)) == ("text" not in rows[0])


def test_what_is_learnt_is_the_same_with_marks_in_the_template_or_without(
    load: Load, model: Callable[..., ModelReference]
) -> None:
    tokenizer = model().tokenizer()
    calls = json.dumps([CALL])
    without = WITH_TOOLS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    of_rows = [
        ({"messages": LONG}, f"{ANSWERS[0]}{END}{ANSWERS[1]}{END}"),
        ({"conversations": sharegpt(LONG, user="human", assistant="gpt")}, f"{ANSWERS[0]}{END}{ANSWERS[1]}{END}"),
        ({"prompt": LONG[:3], "completion": LONG[3:]}, f"{ANSWERS[1]}{END}"),
        ({"messages": CALLS, "tools": [TOOL]}, f"{calls}{END}{ANSWERS[0]}{END}"),
        ({"messages": json.dumps(LONG)}, f"{ANSWERS[0]}{END}{ANSWERS[1]}{END}"),
    ]
    for row, said in of_rows:
        marked, unmarked = load([row], WITH_TOOLS), load([row], without)
        assert tokens_and_labels(marked.train) == tokens_and_labels(unmarked.train)
        as_tokens = tokenizer(said)["input_ids"]
        assert [n for n in tokens_and_labels(marked.train)[0][1] if n != NO_LABEL] == as_tokens
        assert len(marked.lines) == 1, "nothing was left out"


def test_a_prompt_and_its_completion_need_no_chat_template_where_they_are_texts(
    load: Load, model: Callable[..., ModelReference]
) -> None:
    rows = [{"prompt": "the fox", "completion": " sees"}, {"prompt": "", "completion": "the moon"}]
    data = load([*rows, {"prompt": "the owl", "completion": " "}, {"prompt": None, "completion": "a"}], None)
    assert learnt(data, model(None).tokenizer()) == [" sees<eos>", "the moon<eos>"]
    assert data.lines[1:] == ["2 empty completions left out"]
    merged = load([{"prompt": "the m", "completion": "oon"}, *rows], None)
    assert learnt(merged, model(None).tokenizer())[0] == " moon<eos>"
    assert merged.lines[1:] == ["1 completion with a first token that begins in the prompt"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": CHAT, "rejected": CHAT, "source": "a"}, ["chosen (list)", 'data.messages_column = "chosen"']),
        ({"chosen": "a", "rejected": "b"}, ["rejected (string)", 'data.text_column = "chosen"']),
        ({"prompt": "a", "chosen": "a", "rejected": "b", "text": "c"}, ["chosen (string)", "rename chosen"]),
        ({"prompt": "a", "completion": "b", "label": False}, ["label (bool)"]),
        ({"prompt": "a", "number": 1}, ["prompt (string)", "data.text_column"]),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, ["completions (list", "data.text_column"]),
        ({"dialog": CHAT, "id": "a"}, ["dialog (list)", "id (string)", "data.messages_column"]),
        ({"turns": ["a", "b"], "id": "a"}, ["turns (list", "data.text_column"]),
        ({"chat": {"turns": CHAT}, "id": "a"}, ["chat (struct)", "data.messages_column"]),
        ({"messages": 3, "id": "a"}, ["messages (int64)", "data.text_column"]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_string_beside_a_layout_that_is_not_learnt_is_not_taken_for_the_text(
    load: Load, row: dict[str, Any], said: list[str]
) -> None:
    for streaming in (False, True):
        with pytest.raises(DataError) as caught:
            load([row] * 2, streaming=streaming)
        assert all(part in str(caught.value) for part in said), str(caught.value)
    strings = [name for name, value in row.items() if isinstance(value, str)]
    for name in strings:
        assert load([row] * 2, packing=False, text_column=name).lines, "a column that was asked for is learnt"


def test_columns_that_are_not_used_are_listed(load: Load) -> None:
    row = {"messages": CHAT, "tools": [], "text": "a", "id": 3}
    assert load([row]).lines[1:] == ["not used: columns text, id"]
    assert load([row], text_column="text", packing=False).lines[1:] == ["not used: columns messages, tools, id"]
    assert "not used: columns text, id" in load([row], streaming=True).lines


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": sharegpt(CHAT, user="narrator")}, ["message 2", "'narrator'", "human"]),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, ["message 1", "human"]),
        ({"messages": [CHAT[1], {"role": "assistant", "content": None}]}, ["message 2", "role and content"]),
        ({"messages": [{"role": "user", "content": None, "tool_calls": [CALL]}]}, ["message 1", "role and content"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["message 1", "int"]),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ["message 1", "'image'"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, ["message 1", "'text'"]),
        ({"messages": "[the fox]"}, ["JSON", "data.text_column"]),
        ({"messages": "{}"}, ["dict"]),
        ({"prompt": "the fox", "completion": CHAT}, ["prompt", "completion"]),
        ({"messages": CHAT, "tools": "moon"}, ["tools", "JSON"]),
        ({"messages": CHAT, "tools": "{}"}, ["tools", "dict"]),
        ({"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}, ["add_generation_prompt"]),
        ({"messages": CALLS}, ["tool_calls", "content"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else ", ".join(value),
)  # fmt: skip
def test_a_row_that_cannot_be_learnt_as_it_is_is_refused_with_its_number(
    load: Load, row: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, column '\w+', row 2: ") as caught:
        load([dict.fromkeys(row), row], AS_GIVEN)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize("template", [AS_GIVEN, MARKED, IN_PARTS, ONLY_PARTS])
def test_content_in_parts_and_as_a_text_is_written_by_every_template(
    load: Load, model: Callable[..., ModelReference], template: str
) -> None:
    parts = [{"type": "text", "text": part} for part in SENTENCES[0].partition(" ")]
    of_parts = load([{"messages": [{**CHAT[0], "content": parts}, *CHAT[1:]]}], template)
    of_text = load([{"messages": CHAT}], template)
    assert tokens_and_labels(of_parts.train) == tokens_and_labels(of_text.train)
    tokenizer = model().tokenizer()
    assert tokenizer.decode(of_text.train[0]["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learnt(of_parts, tokenizer) == [f"{ANSWERS[0]}{END}"]
    assert len(of_parts.lines) == len(of_text.lines) == 1, "nothing was left out"


def test_what_a_template_leaves_out_is_counted(load: Load) -> None:
    without_system = "{% for m in messages if m['role'] != 'system' %}" + PLAIN.partition("%}")[2]
    data = load([{"messages": CHAT, "tools": [TOOL]}, {"messages": CHAT[1:], "tools": None}], without_system)
    assert data.lines[1:] == [
        "1 message that the model's chat template leaves out or rewrites",
        "1 conversation with tools that the model's chat template leaves out",
    ]
    greeting = {"role": "assistant", "content": ANSWERS[1]}
    opened = "1 conversation begun by the assistant, whose first message is not learnt"
    assert load([{"messages": [greeting, *CHAT[1:]]}], PLAIN).lines[1:] == [opened]
    assert load([{"messages": [greeting, *CHAT[1:]]}], MARKED).lines[1:] == []
    thought = {**CHAT[2], "reasoning_content": "a thought"}
    said = "1 message that the model's chat template leaves out or rewrites"
    assert load([{"messages": [*CHAT[:2], thought]}], MARKED).lines[1:] == [said]


def test_an_answer_without_an_end_to_learn_is_counted(load: Load) -> None:
    outside = MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert outside != MARKED
    data = load([{"messages": CHAT}] * 2, outside)
    assert data.lines[1:] == ["2 conversations with no special token to end by"]


def test_tokens_behind_the_last_packed_row_are_counted(load: Load, model: Callable[..., ModelReference]) -> None:
    data = load([{"text": text} for text in SENTENCES], max_length=32)
    every = len(model().tokenizer()("<eos>".join(SENTENCES))["input_ids"])
    assert data.lines[1:] == [f"{every - 32 * len(data.train)} tokens left out, which fill no row at the end"]


def test_parquet_gives_calls_and_tools_no_keys_that_only_other_rows_have(
    load: Load, model: Callable[..., ModelReference], tmp_path: Path
) -> None:
    call, tool = copy.deepcopy(CALL), copy.deepcopy(TOOL)
    call["function"]["arguments"] = {"sun": ["owl"]}  # type: ignore[index]
    tool["function"]["parameters"] = {"required": ["sun"]}  # type: ignore[index]
    first = {"type": "function", "function": {"name": "moon", "parameters": {"type": "object"}}}
    other = [CALLS[0], {**CALLS[1], "tool_calls": [call]}, *CALLS[2:]]
    rows = [{"messages": CALLS, "tools": [first]}, {"messages": other, "tools": [tool]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    table = DataTable(name=str(tmp_path / "rows.parquet"), max_length=512)
    of_parquet = load_data(table, model(WITH_TOOLS))
    assert tokens_and_labels(of_parquet.train) == tokens_and_labels(load(rows, WITH_TOOLS).train)


def test_tools_are_written_by_the_template_that_the_tokenizer_has_for_them(
    model: Callable[..., ModelReference],
) -> None:
    tokenizer = model().tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": WITH_TOOLS}
    encode = conversation_encoder(tokenizer, "tiny")
    assert encode(CHAT).has_target
    row = encode(Conversation(messages_of(CALLS), variables={"tools": [TOOL]}))
    assert tokenizer.apply_chat_template(CALLS, tools=[TOOL], return_dict=False) == row.input_ids
    assert sum(label != NO_LABEL for label in row.labels) > len(tokenizer(ANSWERS[0])["input_ids"]) + 1


@pytest.mark.parametrize("written", ["{{ m.content + '\\n' }}", "{{ '\\n ' + m.content }}"])
@pytest.mark.parametrize("marked", [True, False])
def test_white_space_that_is_in_no_token_ends_or_begins_an_answer(written: str, marked: bool) -> None:
    """transformers' own mask then goes on to the end of the row, or stops before the answer and all that follow."""
    tokenizer = tiny_tokenizer()
    said = f"{{% generation %}}{written}{{% endgeneration %}}" if marked else written
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' <|' + m.role + '|> ' }}"
        f"{{% if m.role == 'assistant' %}}{said}{{% else %}}{{{{ m.content + '\n' }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
    )
    talk = conversation(words(10, 11), words(20, 21)) + conversation(words(30, 31), words(40, 41))
    row = conversation_encoder(tokenizer, "tiny")(talk)
    assert tokenizer.convert_ids_to_tokens([n for n in row.labels if n != NO_LABEL]) == ["w20", "w21", "w40", "w41"]


@pytest.mark.parametrize(
    ("adds", "texts", "once"),
    [
        ("<bos> $A <eos>", ["the moon", "<bos>the moon", "the moon<eos>", "<bos>the moon<eos>"], 3),
        ("<bos> $A", ["the moon", "the moon<eos>", "<bos>the moon"], 1),
        ("$A", ["<bos>the moon", "<bos>the moon<eos>"], 0),
    ],
)
def test_special_tokens_that_the_tokenizer_adds_and_a_text_has_are_written_once(
    tmp_path: Path, adds: str, texts: list[str], once: int
) -> None:
    path = write_model(tmp_path / "adds")
    tokenizer = resolve(str(path)).tokenizer()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    specials: Any = [("<bos>", begin), ("<eos>", end)]
    single = processors.TemplateProcessing(single=adds, special_tokens=specials)  # type: ignore[call-arg]
    tokenizer.backend_tokenizer.post_processor = single
    tokenizer.save_pretrained(path)
    said = tokenizer("the moon", add_special_tokens=False)["input_ids"]
    for noun, row in (("text", {"text": "{}"}), ("completion", {"prompt": "", "completion": "{}"})):
        file = tmp_path / f"{noun}.jsonl"
        file.write_text("".join(json.dumps(row).replace("{}", text) + "\n" for text in [*texts, "<eos>"]))
        data = load_data(DataTable(name=str(file), max_length=64, packing=False), resolve(str(path)))
        assert [ids for ids, _ in tokens_and_labels(data.train)][: len(texts)] == [[begin, *said, end]] * len(texts)
        with_eos = once + (adds == "<bos> $A <eos>")
        told = f"{counted(with_eos, noun)} with special tokens at an end that the tokenizer adds, written once"
        assert [line for line in data.lines if "written once" in line] == ([told] if with_eos else [])


def test_a_weight_of_an_answer_is_not_used_and_counted(load: Load) -> None:
    for weight, told in ((1, []), (0, ["1 answer with a weight of another value than 1, which is not used"])):
        data = load([{"messages": [CHAT[1], {**CHAT[2], "weight": weight}]}])
        assert data.lines[1:] == told
