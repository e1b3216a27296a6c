"""Read small files that a user writes (keys, tenants, configurations), with a bound on their size.

A pipe or a device, on which a read could block forever, is read only with `regular=False`.
"""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from zsl.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32  # of nested tables and lists


def read_small_file(path: Path, *, regular: bool = True) -> bytes:
    """Read a file of at most `MAX_FILE_BYTES`, by default a regular one only.

    Raises `OSError`; `ConfigError` if it is too large, not a regular file, or written to meanwhile.
    """
    # Non-blocking: without a writer, opening a pipe would wait.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (os.O_NONBLOCK if regular else 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        before = os.fstat(file.fileno())
        if regular and not stat.S_ISREG(before.st_mode):
            raise ConfigError(f"{path} is not a regular file; give a file, not a directory, a pipe or a device")
        content = file.read(MAX_FILE_BYTES + 1)
        after = os.fstat(file.fileno())
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: is it the right file?")
    if regular and (before.st_mtime_ns, len(content)) != (after.st_mtime_ns, after.st_size):
        raise ConfigError(f"{path} was written to while it was read: write a new file beside it, and rename that")
    return content


def read_toml(path: Path, *, regular: bool = True) -> dict[str, Any]:
    """Read a small TOML file. Raises `FileNotFoundError`, or `ConfigError` for any other failure."""
    try:
        text = read_small_file(path, regular=regular).decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return parse_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises `ConfigError`, also for tables and lists nested deeper than `MAX_DEPTH`."""
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(_TOO_DEEP) from None
    except ValueError as error:  # TOMLDecodeError, and int() for numbers of thousands of digits
        raise ConfigError(f"not valid TOML: {error}") from error
    level: list[Any] = [tables]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
    if level:
        raise ConfigError(_TOO_DEEP)
    return tables


_TOO_DEEP = f"not valid TOML here: more than {MAX_DEPTH} nested tables or lists"
