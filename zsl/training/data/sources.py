"""Where documents come from: texts, files of rows, directories, the hub. Knows no tokens.

Everything but a text is read by `datasets`.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from zsl.errors import ConfigError, DataError
from zsl.split.hub import why_offline
from zsl.split.reference import first_line
from zsl.training.data.reading import FILES_OF_ROWS, foreign_errors, silence_libraries
from zsl.training.data.table import NOT_FOR_A_TEXT, PYTHON_DOCS, SYNTHETIC, WIKITEXT, DataTable

WIKITEXT_ID, WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
TEXT_FILES = (".txt", ".md", ".rst", ".text")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Documents:
    """Rows to make tokens of."""

    described: str
    rows: Dataset | IterableDataset
    identity: str  # what tells apart two data sets of the same name, as far as that is known without reading them
    is_text: bool = False  # one column, `text`, with a whole file in each row
    has_splits: bool = False
    reader: str | None = None  # that of `datasets` for local `files`, to find the one that cannot be read
    files: tuple[str, ...] = ()


def open_documents(table: DataTable) -> Documents:
    """The documents that `table` names.

    Raises `ConfigError` for a name that stands for nothing, and for keys that have no meaning for it; `DataError` for
    what cannot be read or is not there.
    """
    silence_libraries()
    if table.name == PYTHON_DOCS:
        return _texts(table, {PYTHON_DOCS: python_docs_text()})
    if files := local_files(table.name):
        if len(files) == 1 and files[0].is_dir():
            return _repository(table, str(files[0].resolve()), table.config)
        return _files(table, files)
    if table.name == WIKITEXT:
        return _repository(table, WIKITEXT_ID, table.config or WIKITEXT_CONFIG)
    is_path = Path(table.name).suffix in (*FILES_OF_ROWS, *TEXT_FILES)
    if HUB_ID.fullmatch(table.name) and not is_path:
        return _repository(table, table.name, table.config)
    known = f"{SYNTHETIC}, {PYTHON_DOCS}, {WIKITEXT}, a hub id org/name"
    raise ConfigError(f"data.name = {table.name!r}: no such data set ({known}) and no such file")


def validation_documents(table: DataTable, place: str, documents: Documents) -> Documents:
    """Those of the split or file `place`, to validate on beside `documents`. Raises as `open_documents` does."""
    if local_files(place):
        return open_documents(
            table.model_copy(update={"name": place, "config": None, "split": "train", "streaming": False})
        )
    if documents.has_splits and "/" not in place and Path(place).suffix not in (*FILES_OF_ROWS, *TEXT_FILES):
        return open_documents(table.model_copy(update={"split": place}))
    splits = "" if documents.has_splits else f", and {table.name} has no splits"
    raise ConfigError(f"data.validation = {place!r}: no such file{splits}")


def local_files(name: str) -> list[Path]:
    """What there is on disk under a path or pattern, in order."""
    path = Path(name).expanduser()
    if path.exists():
        return [path]
    return [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]


def python_docs_text() -> str:
    """The language reference that every Python carries as the help of its `help()`: real English, always there."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _texts(table: DataTable, texts: dict[str, str]) -> Documents:
    if given := table.given(NOT_FOR_A_TEXT):
        raise ConfigError(f"data.{given[0]} has no meaning for data.name = {table.name!r}, which is a text")
    for name, text in texts.items():
        if not text.strip():
            raise DataError(f"{name} is empty")
    described = table.name if len(texts) == 1 else f"{table.name} ({len(texts)} files)"
    return Documents(described, Dataset.from_dict({"text": list(texts.values())}), "", is_text=True)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{file} cannot be read: {reason}") from error


def _files(table: DataTable, files: list[Path]) -> Documents:
    suffixes = sorted({file.suffix for file in files if file.suffix in FILES_OF_ROWS})
    if not suffixes:
        return _texts(table, {str(file): _read_text(file) for file in files})
    reader, options = FILES_OF_ROWS[suffixes[0]]
    if any(FILES_OF_ROWS.get(file.suffix) != (reader, options) for file in files):
        kinds = ", ".join(sorted({file.suffix or "none" for file in files}))
        raise ConfigError(f"data.name = {table.name!r}: files of one kind are needed, and these are {kinds}")
    if given := table.given(["config", "split"]):
        raise ConfigError(f"data.{given[0]} has no meaning for data.name = {table.name!r}, which names files")
    paths = [str(file.resolve()) for file in files]
    for path in paths:
        if not Path(path).stat().st_size:
            raise DataError(f"{path} is empty")
    with foreign_errors(table.name, reader=reader, files=paths):
        builder = datasets.load_dataset_builder(
            reader, data_files={"train": [glob.escape(path) for path in paths]}, **options
        )
        rows = _rows(table, builder)
    described = table.name if len(files) == 1 else f"{table.name} ({len(files)} files)"
    return Documents(described, rows, _identity_of_files(builder), reader=reader, files=tuple(paths))


def _repository(table: DataTable, place: str, config: str | None) -> Documents:
    """A data set of the hub, or a directory that is laid out as one."""
    is_local = Path(place).is_absolute()
    offline = None if is_local else why_offline()
    what = f"data set {table.name!r}"
    with foreign_errors(what):
        try:
            builder = datasets.load_dataset_builder(place, config)
        except ConnectionError as error:
            raise DataError(f"data set {place!r} is not cached here, and {offline or first_line(error)}") from error
        except ValueError as error:
            if listed := re.search(r"onfig.*\[(.*)\]", str(error), re.DOTALL):
                raise DataError(_about_configurations(what, config, listed[1], cached=bool(offline))) from error
            raise
    files = [str(file) for of_split in (builder.config.data_files or {}).values() for file in of_split]
    with foreign_errors(what, reader=builder.name, files=files if is_local else ()):
        rows = _rows(table, builder)
    described = table.name if is_local or place == table.name else f"{table.name} ({place})"
    if builder.config.name != "default":
        described += f", configuration {builder.config.name}"
    described += f", split {table.split}" + (" (as cached here)" if offline else "")
    identity = _identity_of_files(builder) if is_local else f"{place} {builder.hash}"
    documents = Documents(described, rows, identity, has_splits=True)
    return replace(documents, reader=builder.name, files=tuple(files)) if is_local else documents


def _rows(table: DataTable, builder: Any) -> Dataset | IterableDataset:
    splits: Any
    if table.streaming:
        splits = builder.as_streaming_dataset()
        if table.split in splits:
            return splits[table.split]
    else:
        builder.download_and_prepare()
        splits = builder.info.splits
        try:
            return builder.as_dataset(split=table.split)
        except ValueError:
            if table.split in splits:
                raise DataError(f"{table.name} has no rows") from None
    raise DataError(f"data set {table.name!r} has no split {table.split!r}; it has {', '.join(map(str, splits))}")


def _about_configurations(what: str, config: str | None, listed: str, *, cached: bool) -> str:
    there_is = listed.replace("'", "") + (" (cached here)" if cached else "")
    if config is None:
        return f"{what} has several configurations; name one with data.config: {there_is}"
    return f"{what} has no configuration {config!r}; it has {there_is}"


def _identity_of_files(builder: Any) -> str:
    files = builder.config.data_files or {}
    return str({str(split): [*map(str, paths), *paths.origin_metadata] for split, paths in files.items()})
