"""Reading the rows of JSON, JSONL and Parquet files, each with the place it came from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of a data file: its value, or the reason why it cannot be read."""

    source: str
    index: int
    value: Any = None
    error: str | None = None


def read_rows(file: str | os.PathLike[str]) -> list[Row]:
    """Read every row of a ``.json`` (array), ``.jsonl`` or ``.parquet`` file.

    A broken JSONL line becomes a row with an ``error``, so that the caller may skip it.

    Raises:
        DataError: The file is missing, empty, of another kind, or broken beyond single rows.
    """
    rows = list(iter_rows(file))
    if not rows:
        raise DataError(f"{Path(file)}: the file has no rows")
    return rows


def iter_rows(file: str | os.PathLike[str]) -> Iterator[Row]:
    """As :func:`read_rows`, one row at a time; broken files also raise while rows are read. May have no rows."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file named {', '.join('*' + s for s in SUFFIXES)}")
    return _parquet(path) if suffix == ".parquet" else _text(path, suffix)


def _text(path: Path, suffix: str) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return _jsonl(path, text) if suffix == ".jsonl" else _json_array(path, text)


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    index = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            yield Row(source, index, json.loads(line))
        except ValueError as error:
            yield Row(source, index, error=f"broken JSON line ({error})")
        index += 1


def _json_array(path: Path, text: str) -> Iterator[Row]:
    """Walk the array element by element, so that every row knows its line."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]

    def broken(position: int, reason: str) -> DataError:
        return DataError(f"{path}:{text.count(chr(10), 0, position) + 1}: broken JSON ({reason})")

    position = skip(0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}: expected a JSON array of rows (or a .jsonl file with one row a line)")
    position = skip(position + 1)
    if text[position : position + 1] == "]":
        return
    index = 0
    while True:
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError as error:
            raise broken(getattr(error, "pos", position), getattr(error, "msg", str(error))) from None
        line += text.count("\n", counted, position)
        counted = position
        yield Row(f"{path}:{line}", index, value)
        index += 1
        position = skip(end)
        following = text[position : position + 1]
        if following == "]":
            break
        if following != ",":
            raise broken(position, "expected ',' or ']' after a row; is the file cut off?")
        position = skip(position + 1)
    if skip(position + 1) != len(text):
        raise broken(position + 1, "text after the end of the array")


def _parquet(path: Path) -> Iterator[Row]:
    import datasets

    try:
        for index, value in enumerate(
            datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        ):
            yield Row(f"{path}:row {index + 1}", index, value)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as Parquet ({first_line})") from None
