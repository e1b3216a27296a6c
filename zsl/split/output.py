"""What a command writes: a directory that is there whole or not at all, and never in the place of another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from zsl.errors import ConfigError, RunFailed, StartupError, ZslError
from zsl.split.durable import aside, reason, sync, sync_tree
from zsl.split.reference import ModelReference, first_line, load_tokenizer


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to write in, which is moved to `target` at the end, unless something was raised.

    Raises `ConfigError` if something is at `target`, but for an empty directory, `StartupError` if nothing can be
    written beside it, and `RunFailed` for what could not be written then.
    """
    parent = target.absolute().parent
    with ExitStack() as stack:
        try:
            taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
            hidden = None if taken else stack.enter_context(aside(parent))
        except OSError as error:
            raise StartupError(f"{parent} cannot be written: {error.strerror}; name another --out") from error
        if hidden is None:
            raise ConfigError(f"{target} is there already: name another --out, or remove it")
        try:
            written = hidden / target.name
            written.mkdir()
            yield written
            for path in written.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors keeps files to their owner
            sync_tree(written)
            os.rename(written, target)
            sync(parent)
        except ZslError:
            raise
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"{target} could not be written: {reason(error)}") from error


def write_tokenizer(reference: ModelReference, directory: Path) -> bool:
    """Write the model's tokenizer, as it is, into a directory; whether it has one.

    Raises `ModelError` if it has one that cannot be loaded, `RunFailed` if it cannot be written.
    """
    tokenizer = load_tokenizer(reference)
    if tokenizer is None:
        return False
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise RunFailed(f"the tokenizer could not be written: {first_line(error)}") from error
    return True


def size_bytes(directory: Path) -> int:
    """Of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
