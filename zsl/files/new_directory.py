"""Write a new directory atomically as the result of a command, without replacing another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from zsl.errors import ConfigError, RunFailed, StartupError, ZslError
from zsl.files.durable import aside, reason, sync, sync_tree


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory, which is moved to `target` at the end, unless an exception was raised.

    Raises `ConfigError` if `target` exists and is not an empty directory, `StartupError` if its parent cannot be
    written, and `RunFailed` if a later write fails.
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
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only the owner can read
            sync_tree(written)
            os.rename(written, target)
            sync(parent)
        except ZslError:
            raise
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"{target} could not be written: {reason(error)}") from error


def size_bytes(directory: Path) -> int:
    """Return the total size of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
