"""What a command writes: a directory that is there whole or not at all, and never in the place of another."""

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


def size_bytes(directory: Path) -> int:
    """Of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
