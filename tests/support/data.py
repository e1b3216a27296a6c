"""A tiny model with a tokenizer and a chat template, and data sets laid out on disk as the hub lays them out."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.models import VOCABULARY, write_checkpoint
from zsl.training.data.synthetic import synthetic_language

SENTENCES = [f"Line {number}: the {animal} sees the moon." for number in range(9) for animal in ("fox", "owl", "hare")]
ANSWERS = ["Yes, it does.", "No, not at all."]

PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As those that leave out what was thought in all turns but the last.
FORGETFUL = PLAIN.replace("m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else '')")

CARD = """---
configs:
- config_name: plain
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
- config_name: chat
  data_files:
  - split: train
    path: chat/train-*
---
"""


def write_model(directory: Path, template: str | None = PLAIN) -> Path:
    """A checkpoint of a tiny llama, with a tokenizer that writes every character of `SENTENCES`."""
    path = write_checkpoint(directory, "llama")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    roles = "system\nuser\nassistant\n"
    tokenizer.train_from_iterator([*SENTENCES, *ANSWERS, roles], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    ).save_pretrained(path)
    return path


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def synthetic_rows(samples: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """The first sentences of the synthetic language."""
    return synthetic_language(length, vocabulary, seed)(samples)


def write_repository(directory: Path, *, card: str = CARD) -> Path:
    """A data set as the hub has it: a card with two configurations, and Parquet files by split."""
    numbered = {"text": SENTENCES, "number": list(range(len(SENTENCES)))}
    chat = {"messages": [conversation(question, ANSWERS[0]) for question in SENTENCES]}
    for path, rows in {
        "data/train-00000-of-00001": Dataset.from_dict(numbered),
        "data/validation-00000-of-00001": Dataset.from_dict({"text": SENTENCES[:5], "number": list(range(5))}),
        "chat/train-00000-of-00001": Dataset.from_dict(chat),
    }.items():
        file = directory / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(file)
    (directory / "README.md").write_text(card)
    return directory
