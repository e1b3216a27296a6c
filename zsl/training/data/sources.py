"""Open data sets: built-in texts, local files and directories, and data sets of the hub.

Local files are read anew each time: the cache of `datasets` identifies a file by name and time only, and misses a
change that keeps the time (`cp -p`, `rsync -t`, tar).
"""

from __future__ import annotations

import glob
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import pandas as pd  # type: ignore[import-untyped]
import xxhash
from datasets import Dataset, Features, IterableDataset, Value

from zsl.errors import ConfigError, DataError
from zsl.models.hub import why_offline
from zsl.text.first_line import first_line
from zsl.text.plural import counted
from zsl.training.config.data_table import NOT_FOR_A_TEXT, PYTHON_DOCS, SYNTHETIC, WIKITEXT, DataTable
from zsl.training.data.dataset_errors import foreign_errors, silence_libraries
from zsl.training.data.files import KINDS, Kind, kind_of, read_rows, read_text

WIKITEXT_ID, WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Documents:
    """Rows of an opened data set, before tokenizing."""

    described: str
    rows: Dataset | IterableDataset
    hub_identity: str = ""  # tells apart two data sets of the same name
    is_text: bool = False  # one column, `text`, with a whole file in each row
    has_splits: bool = False
    reader: str | None = None  # of files of rows: their kind, or the builder of `datasets`
    files: tuple[str, ...] = ()  # local ones

    def identity(self) -> str:
        """Return a digest of local files' content, or the identity of a data set of the hub.

        Raises `DataError` for a file that cannot be read.
        """
        content = xxhash.xxh3_128()
        with foreign_errors(self.described):
            for file in self.files:
                content.update(f"{Path(file).stat().st_size} ".encode())
                with Path(file).open("rb") as part:
                    while read := part.read(1 << 20):
                        content.update(read)
        return self.hub_identity or content.hexdigest()


def open_documents(table: DataTable) -> Documents:
    """Open the data set that `table` names.

    Raises `ConfigError` for an unknown name, and for keys that do not apply to it; `DataError` for missing or
    unreadable data.
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
    if HUB_ID.fullmatch(table.name) and not kind_of(table.name):
        return _repository(table, table.name, table.config)
    known = f"{SYNTHETIC}, {PYTHON_DOCS}, {WIKITEXT}, a hub id org/name"
    raise ConfigError(f"data.name = {table.name!r}: no such data set ({known}) and no such file")


def validation_documents(table: DataTable, place: str, documents: Documents) -> Documents:
    """Open the split or file `place` to validate on, beside `documents`. Raises as `open_documents`."""
    if local_files(place):
        return open_documents(
            table.model_copy(update={"name": place, "config": None, "split": "train", "streaming": False})
        )
    if documents.has_splits and "/" not in place and not kind_of(place):
        return open_documents(table.model_copy(update={"split": place}))
    splits = "" if documents.has_splits else f", and {table.name} has no splits"
    raise ConfigError(f"data.validation = {place!r}: no such file{splits}")


def local_files(name: str) -> list[Path]:
    """Return the existing file or directory at a path, or the files of a pattern, sorted."""
    path = Path(name).expanduser()
    if path.exists():
        return [path]
    return [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]


def python_docs_text() -> str:
    """Return the Python language reference, which every Python includes for `help()`: real English, offline."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _texts(table: DataTable, texts: dict[str, str]) -> Documents:
    if given := table.given(NOT_FOR_A_TEXT):
        raise ConfigError(f"data.{given[0]} has no meaning for data.name = {table.name!r}, which is a text")
    for name, text in texts.items():
        if not text.strip():
            raise DataError(f"{name} is empty")
    described = table.name if len(texts) == 1 else f"{table.name} ({len(texts)} files)"
    return Documents(described, Dataset.from_dict({"text": list(texts.values())}), is_text=True)


def _files(table: DataTable, files: list[Path]) -> Documents:
    kinds = {kind_of(file) for file in files}
    kind = kinds.pop()
    if kinds:
        suffixes = ", ".join(sorted({file.suffix or "none" for file in files}))
        raise ConfigError(f"data.name = {table.name!r}: files of one kind are needed, and these are {suffixes}")
    if kind is None:
        rows = ", ".join(suffix for suffix, kind in KINDS.items() if kind != "text")
        raise ConfigError(
            f"{files[0]}: its suffix does not say what is in it. Rename or convert it: a text is .txt, .text, .md, "
            f".markdown or .rst, rows are {rows}; all but .parquet may be .gz, .bz2, .xz or .zst"
        )
    if kind == "text":
        return _texts(table, {str(file): read_text(str(file)) for file in files})
    if given := table.given(["config", "split"]):
        raise ConfigError(f"data.{given[0]} has no meaning for data.name = {table.name!r}, which names files")
    paths = [str(file.resolve()) for file in files]
    for path in paths:
        if not Path(path).stat().st_size:
            raise DataError(f"{path} is empty")
    described = table.name if len(files) == 1 else f"{table.name} ({len(files)} files)"
    return _local_rows(described, kind, paths)


def _local_rows(described: str, kind: Kind, files: list[str]) -> Documents:
    with foreign_errors(described, reader=kind, files=files):
        if kind == "parquet":
            builder = datasets.load_dataset_builder(kind, data_files=[glob.escape(file) for file in files])
            rows = builder.as_streaming_dataset(split="train")
        else:
            rows = IterableDataset.from_generator(read_rows, gen_kwargs={"files": files, "kind": kind})
    return Documents(described, rows, reader=kind, files=tuple(files))


def _repository(table: DataTable, place: str, config: str | None) -> Documents:
    """Open a data set of the hub, or a local directory in the hub's layout."""
    is_local = Path(place).is_absolute()
    offline = None if is_local else why_offline()
    what = f"data set {table.name!r}"
    with foreign_errors(what):
        try:
            builder = datasets.load_dataset_builder(place, config) if is_local else _of_hub(place, config, offline)
        except ConnectionError as error:
            raise DataError(f"data set {place!r} is not cached here, and {offline or first_line(error)}") from error
        except ValueError as error:
            if listed := re.search(r"onfig.*\[(.*)\]", str(error), re.DOTALL):
                raise DataError(_about_configurations(what, config, listed[1], cached=bool(offline))) from error
            raise
    described = table.name if is_local or place == table.name else f"{table.name} ({place})"
    if builder.config.name != "default":
        described += f", configuration {builder.config.name}"
    described += f", split {table.split}" + (" (as cached here)" if offline else "")
    if not is_local:
        with foreign_errors(what):
            rows = _rows(table, builder)
        reader = builder.info.builder_name
        return Documents(described, rows, f"{place} {builder.hash}", has_splits=True, reader=reader)
    splits = builder.config.data_files
    if table.split not in splits:
        raise _no_split(table, splits)
    if len(builder.builder_configs) < 2 and (others := _not_read(Path(place), splits)):
        described += f", without {counted(len(others), 'file')} of rows that no split has: {', '.join(others[:3])}"
    files = [str(file) for file in splits[table.split]]
    if kind := _plain_kind(builder.config, files):
        return replace(_local_rows(described, kind, files), has_splits=True)
    with foreign_errors(what):
        if builder.name == "csv":
            builder = _of_texts(place, config)
        rows = builder.as_streaming_dataset(split=table.split)
    return Documents(described, rows, has_splits=True, reader=builder.name, files=tuple(files))


def _not_read(directory: Path, splits: Any) -> list[str]:
    """Return the files of rows that `datasets` ignores, such as those with a suffix other than the most common."""
    read = {str(file) for files in splits.values() for file in files}
    files = (file for file in sorted(directory.rglob("*")) if kind_of(file) not in (None, "text") and file.is_file())
    return [str(file.relative_to(directory)) for file in files if str(file) not in read]


def _plain_kind(config: Any, files: list[str]) -> Kind | None:
    """Return the kind of a directory's files, or None if they differ or the card sets options for reading."""
    kinds = {kind_of(file) for file in files}
    same = {key: getattr(config, key) for key in ("name", "version", "data_dir", "data_files", "description")}
    if kinds == {"tsv"}:
        same["sep"] = "\t"
    if len(kinds) > 1 or kinds <= {"text", None} or config != type(config)(**same):
        return None
    return kinds.pop()


def _of_hub(place: str, config: str | None, offline: str | None) -> Any:
    if offline:  # the file type is unknown before the cached data set is found
        with suppress(ConnectionError, ValueError):
            return datasets.load_dataset_builder(place, config, cache_dir=_cache_of_texts())
    builder = datasets.load_dataset_builder(place, config)
    if builder.info.builder_name != "csv":
        return builder
    if offline:
        raise DataError(f"data set {place!r} is cached here without its texts NA, null and the like, and {offline}")
    return _of_texts(place, config)


def _cache_of_texts() -> str:
    """Return a cache folder of its own, since pandas parses the same files to other values."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "csv-as-written")


def _of_texts(place: str, config: str | None) -> Any:
    """Make a builder that reads CSV values as text; by default pandas reads NA as missing and 007 as 7."""
    builder = datasets.load_dataset_builder(place, config, cache_dir=_cache_of_texts())
    file = str(next(iter(builder.config.data_files.values()))[0])
    options = {**builder.config.pd_read_csv_kwargs, "chunksize": None, "nrows": 1}
    with fsspec.open(file, compression="infer") as lines:
        first = pd.read_csv(lines, **options)
    if not isinstance(first.index, pd.RangeIndex):  # pandas makes the first fields an index
        raise DataError(f"{file}: its rows have more fields than its header")
    builder.config.features = builder.info.features = Features({name: Value("string") for name in first.columns})
    builder.config.keep_default_na, builder.config.na_values = False, [""]
    return builder


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
    raise _no_split(table, splits)


def _no_split(table: DataTable, splits: Any) -> DataError:
    return DataError(f"data set {table.name!r} has no split {table.split!r}; it has {', '.join(map(str, splits))}")


def _about_configurations(what: str, config: str | None, listed: str, *, cached: bool) -> str:
    there_is = listed.replace("'", "") + (" (cached here)" if cached else "")
    if config is None:
        return f"{what} has several configurations; name one with data.config: {there_is}"
    return f"{what} has no configuration {config!r}; it has {there_is}"
