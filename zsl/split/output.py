"""What a command writes: a directory that is there whole or not at all, and never in the place of another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from zsl.errors import ConfigError, ModelError, RunFailed, ZslError
from zsl.split.durable import aside, sync, sync_tree
from zsl.split.reference import ModelReference, first_line

# What tokenizers are usually kept in; one that loads says itself what more there is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to write in, which is moved to `target` at the end, unless something was raised.

    Raises `ConfigError` if something is at `target`, but for an empty directory, and `RunFailed` for what could not
    be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} is there already: name another --out, or remove it")
    try:
        with aside(target.absolute().parent) as hidden:
            written = hidden / target.name
            written.mkdir()
            yield written
            for path in written.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors keeps files to their owner
            sync_tree(written)
            os.rename(written, target)
        sync(target.absolute().parent)
    except ZslError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{target} could not be written: {first_line(error)}") from error


def write_tokenizer(reference: ModelReference, directory: Path) -> bool:
    """Write the model's tokenizer, as it is, into a directory; whether it has one.

    Raises `ModelError` if it has one that cannot be loaded, `RunFailed` if it cannot be written.
    """
    if reference.location is None:
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference.location)
    except Exception as error:  # a damaged file raises whatever the library comes to first
        there = _present(reference.location, TOKENIZER_FILES)
        if not there:
            return False
        raise ModelError(
            f"{reference.text}: its tokenizer ({', '.join(there)}) cannot be loaded: {first_line(error)}"
        ) from error
    names = {*TOKENIZER_FILES[:2], *tokenizer.vocab_files_names.values()}
    if not _present(reference.location, sorted(names)):
        return False  # transformers has made an empty one
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise RunFailed(f"the tokenizer could not be written: {first_line(error)}") from error
    return True


def _present(location: str, names: Sequence[str]) -> list[str]:
    """Those of the files that there are in a directory or at the hub."""
    there = (
        cached_file(
            location,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in names
    )
    return [name for name, file in zip(names, there, strict=True) if file]


def size_bytes(directory: Path) -> int:
    """Of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
