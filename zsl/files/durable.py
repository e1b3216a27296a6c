"""Write files and directories atomically: into a temporary directory, fsync, then rename.

The names of temporary directories, which a killed process may leave, begin with `.saving-`. Independent of the files'
content.
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
    """Yield a temporary directory in `parent`. All that was not moved out of it is removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=ASIDE, dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_file(target: Path, content: bytes) -> None:
    """Replace the content of `target` atomically. Raises `OSError`, and then leaves `target` unchanged."""
    with aside(target.parent) as directory:
        file = directory / target.name
        file.write_bytes(content)
        sync(file)
        os.replace(file, target)
    sync(target.parent)


def remove_tree(directory: Path) -> None:
    """Remove a directory atomically. Raises `OSError` if it cannot be renamed first."""
    doomed = directory.with_name(f"{ASIDE}{directory.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove temporary directories of killed processes. Safe only if no other process writes in `directory`."""
    for leftover in directory.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Flush a directory and all that is in it to disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync directories.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Return the reason why a file could not be written, without its temporary name."""
    why = error.strerror if isinstance(error, OSError) else None
    return why or (str(error).strip().splitlines() or [type(error).__name__])[0]
