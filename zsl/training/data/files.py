"""Read local text, JSON and CSV files, compressed or not, without guessing types or missing values.

Errors name the file and the line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]

from zsl.errors import DataError
from zsl.text.first_line import first_line

Kind = Literal["text", "json", "csv", "tsv", "parquet"]
Row = dict[str, Any]

KINDS: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "json"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
DECOMPRESS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pa.input_stream(file, compression="zstd")),
}


def kind_of(path: str | Path) -> Kind | None:
    """Return the kind of a file by its suffix, before one of a compression, in any case; None if unknown."""
    name = Path(str(path).lower())
    if name.suffix not in DECOMPRESS:
        return KINDS.get(name.suffix)
    kind = KINDS.get(Path(name.stem).suffix)
    return None if kind == "parquet" else kind  # Parquet compresses its own pages


def read_text(file: str) -> str:
    """Read a whole text file. Raises `DataError` for a file that cannot be read."""
    return "".join(_lines(file))


def read_rows(files: list[str], kind: Kind) -> Iterator[Row]:
    """Yield the rows of all files in order. A column that a row lacks is None.

    Raises `DataError` for a file that cannot be read, and for an invalid row.
    """
    for file in files:
        yield from _json_rows(file) if kind == "json" else _csv_rows(file, "\t" if kind == "tsv" else ",")


def _lines(file: str) -> Iterator[str]:
    decompress = DECOMPRESS.get(Path(file).suffix.lower())
    try:
        with decompress(file) if decompress else Path(file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if b"\0" in line:  # valid UTF-8 to a decoder, but a sign of UTF-16
                    raise DataError(f"{file}, line {number}, cannot be read: it has a NUL, so it is not UTF-8 text")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}, line {number}, cannot be read: it is not UTF-8 text") from error
    except (OSError, EOFError, lzma.LZMAError) as error:  # EOFError and LZMAError: a damaged archive
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(f"{file} cannot be read: {reason}") from error


def _json_rows(file: str) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of one JSON list."""
    lines = ((number, line) for number, line in enumerate(_lines(file), 1) if line.strip())
    for number, line in lines:
        if not line.lstrip().startswith("["):
            yield _json_row(_parsed(line.rstrip(), file, number), f"{file}, line {number}", escapes="\\u" in line)
            continue
        text = line + "".join(rest for _, rest in lines)
        for at, value in enumerate(_parsed(text, file, number), 1):
            yield _json_row(value, f"{file}, row {at}", escapes="\\u" in text)


def _parsed(text: str, file: str, number: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{file}, line {number + error.lineno - 1}, column {error.colno}"
        reason = f"{error.msg}; a row is an object in one line, or one item of a list"
        raise DataError(f"{where}: not JSON: {reason}") from error
    except (ValueError, RecursionError) as error:  # a number with too many digits, or too deep nesting
        raise DataError(f"{file}, line {number}, cannot be read: {first_line(error)}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Raises `ValueError` for a duplicate key: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _json_row(value: Any, where: str, *, escapes: bool) -> Row:
    """Check a row; a string becomes its `text`. `escapes`: the text has `\\u`, so check for lone surrogates."""
    row = {"text": value} if isinstance(value, str) else value
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(value).__name__}, not an object with a value for each column")
    try:
        if escapes:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(
            f"{where}: \\u{code:04x} is half of a character (a lone surrogate), which no tokenizer takes; "
            "mend the program that wrote it, or leave the row out"
        ) from error
    return defaultdict(type(None), row)


def _csv_rows(file: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.line_num}, cannot be read: {error}") from error
        where = f"{file}, line {reader.line_num}"
        if values is None:
            return
        if not columns:
            columns = [name or f"column {at}" for at, name in enumerate(values, 1)]
            if twice := sorted({name for name in columns if columns.count(name) > 1}):
                raise DataError(f"{where}: two columns have the name {twice[0]!r}")
        elif len(values) > len(columns):
            raise DataError(f"{where}: {len(values)} fields, where the header names {len(columns)} columns")
        elif values:  # skip blank lines
            yield defaultdict(type(None), zip(columns, values, strict=False))
