"""Turn errors of `datasets` and the hub into one-line `DataError`s, and silence their output."""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.utils import logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from zsl.errors import DataError, StartupError, ZslError
from zsl.text.first_line import first_line

# pyarrow's row number in a JSON error, which is relative to a block of the file, and so removed.
COUNTED_FROM_ZERO = re.compile(r"[.]? in row \d+$")
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def silence_libraries() -> None:
    """Disable progress bars, warnings and logged errors of `datasets` and the hub: failures are raised too."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    disable_progress_bars()


@contextmanager
def foreign_errors(what: str, *, reader: str | None = None, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn any error of the block into `DataError`, which names `what`, or the broken file among `files`.

    Raises `StartupError` for a cache folder that cannot be written.
    """
    try:
        yield
    except ZslError:
        raise
    except Exception as error:
        if about_cache := _problem_with_cache(error):
            raise StartupError(about_cache) from error
        raise DataError(_explanation(what, error, reader, files)) from error


def read_batches(
    batches: Iterable[dict[str, list[Any]]], what: str, *, reader: str | None, files: Sequence[str]
) -> Iterator[dict[str, list[Any]]]:
    """Yield the batches, with errors turned by `foreign_errors`."""
    iterator = iter(batches)
    while True:
        with foreign_errors(what, reader=reader, files=files):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def _problem_with_cache(error: BaseException | None) -> str | None:
    """Return the error text if the cause is a cache folder that cannot be written; else None."""
    folders = {
        "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HOME": constants.HF_HOME,
    }
    while error is not None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(error)
            for variable, folder in folders.items():
                if full or (error.errno in NOT_WRITABLE and str(error.filename).startswith(folder)):
                    reason = error.strerror or first_line(error)
                    return (
                        f"the cache folder {folder} cannot be written: {reason}; "
                        f"name another one in the environment variable {variable}"
                    )
        error = error.__cause__ or error.__context__
    return None


def _explanation(what: str, error: Exception, reader: str | None, files: Sequence[str]) -> str:
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    reason = first_line(cause or error)
    if isinstance(error, StopIteration):
        return f"{what} has no rows"  # `datasets` raises it for an empty data set
    if isinstance(error, DatasetNotFoundError):
        hint = "; log in with `hf auth login`" if "gated" in reason or "cannot be accessed" in reason else ""
        return f"{what}: {reason.rstrip('.')}{hint}"
    if isinstance(error, RuntimeError) and "scripts" in reason:
        return f"{what} needs code of its own ({reason.rpartition(' ')[2]}), which is never run; take a copy in Parquet"
    broken = _first_broken(reader, files) if reader else None
    return f"{broken or what} cannot be read: {re.sub(COUNTED_FROM_ZERO, '', reason)}"


def _first_broken(reader: str, files: Sequence[str]) -> str | None:
    """Return the first local file that `datasets` cannot read, or None."""
    for file in files:
        try:
            for _ in datasets.load_dataset(reader, data_files=[glob.escape(file)], split="train", streaming=True):
                pass
        except Exception:
            return file
    return None
