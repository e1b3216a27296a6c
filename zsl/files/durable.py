"""Files and directories that are there whole or not at all: written aside, brought to the disk, renamed.

What a killed process leaves aside begins with `.saving-`. Knows nothing of what is in the files.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".saving-"


@contextmanager
def aside(parent: Path) -> Iterator[Path]:
    """A directory in `parent` to write in. What was not renamed out of it is gone at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=ASIDE, dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_file(target: Path, content: bytes) -> None:
    """Put `content` in place of what `target` held. Raises `OSError`, and then that is still there."""
    with aside(target.parent) as directory:
        file = directory / target.name
        file.write_bytes(content)
        sync(file)
        os.replace(file, target)
    sync(target.parent)


def remove_tree(directory: Path) -> None:
    """Let a directory disappear in one moment. Raises `OSError` if it stays."""
    doomed = directory.with_name(f"{ASIDE}{directory.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process was writing. For who alone writes there."""
    for leftover in directory.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Bring a directory and all that is in it to the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Bring a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do it for directories.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """The reason that a file could not be written, without the name that it had aside."""
    why = error.strerror if isinstance(error, OSError) else None
    return why or (str(error).strip().splitlines() or [type(error).__name__])[0]
