"""Training data: token rows of one length, with the labels that stay at the client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset

from zsl.errors import ConfigError, DataError
from zsl.split.reference import ModelReference
from zsl.training.data.table import DataTable

SYNTHETIC_SAMPLES = 20
# The synthetic language: so many words, and for each the chances of its next ones.
SYNTHETIC_WORDS = 32
SUCCESSOR_CHANCES = (0.85, 0.10, 0.05)


def load_data(table: DataTable, reference: ModelReference) -> tuple[Dataset, str]:
    """The data set of a configuration, and a line that describes it.

    Columns `input_ids` and `labels`, each row `max_length` tokens. Raises `ConfigError` for an unknown name or rows
    longer than the model takes, `DataError` for a text that is empty or cannot be read.
    """
    config = reference.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and table.max_length > positions:
        raise ConfigError(
            f"data.max_length = {table.max_length}: {reference.text} takes at most {positions} tokens a row"
        )
    if table.name == "synthetic":
        rows = synthetic_rows(table.samples or SYNTHETIC_SAMPLES, table.max_length, config.vocab_size, table.seed)
    else:
        rows = _text_rows(table, reference)
    described = f"{table.name}, {len(rows):,} rows of {table.max_length} tokens"
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch"), described


def synthetic_rows(samples: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Sentences of a small seeded language: a Markov chain over a few words of the vocabulary.

    What follows a word is mostly certain, so a model that learns the chain gets from ln(vocabulary) to the chain's
    entropy of about half a nat.
    """
    random = np.random.default_rng(seed)
    words = random.choice(vocabulary, size=min(SYNTHETIC_WORDS, vocabulary), replace=False)
    next_words = np.stack([random.choice(len(words), len(SUCCESSOR_CHANCES), replace=False) for _ in words])
    rows = np.empty((samples, length), dtype=np.int64)
    state = random.integers(len(words), size=samples)
    for position in range(length):
        rows[:, position] = words[state]
        branch = random.choice(len(SUCCESSOR_CHANCES), size=samples, p=SUCCESSOR_CHANCES)
        state = next_words[state, branch]
    return list(rows.tolist())


def python_docs_text() -> str:
    """The language reference that every Python carries as the help of its `help()`: real English, always there."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


TEXTS: dict[str, Callable[[], str]] = {"python-docs": python_docs_text}


def _text_rows(table: DataTable, reference: ModelReference) -> list[list[int]]:
    text = TEXTS[table.name]() if table.name in TEXTS else _read_text(table.name)
    if not text.strip():
        raise DataError(f"data.name = {table.name!r}: the file is empty")
    tokenizer = reference.tokenizer()
    tokenizer.model_max_length = 1 << 30  # the text is cut into rows below
    tokens = tokenizer(text)["input_ids"]
    rows = [tokens[i : i + table.max_length] for i in range(0, len(tokens) - table.max_length + 1, table.max_length)]
    if not rows:
        raise DataError(
            f"data.name = {table.name!r}: {len(tokens)} tokens do not fill one row of {table.max_length}; "
            "lower data.max_length"
        )
    return rows[: table.samples]


def _read_text(name: str) -> str:
    file = Path(name).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(["synthetic", *TEXTS])
        raise ConfigError(f"data.name = {name!r}: no such data set ({known}) and no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"data.name = {name!r} cannot be read: {reason}") from error
