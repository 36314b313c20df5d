"""The rows of a knowledge file, one after the other, each with the place it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kore.data.rows import Row, iter_rows
from kore.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LONGEST_FIELD = 16 * 1024 * 1024
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def stream_rows(path: Path) -> Iterator[Row]:
    """Read JSONL, JSON, CSV, TSV, Parquet, or a directory that ``datasets.Dataset.save_to_disk`` wrote.

    JSONL, CSV, Parquet and dataset directories are read as they are asked for; a JSON array is held as text. A row
    that cannot be read becomes one with an ``error``.

    Raises:
        DataError: The file is missing, of another kind, or broken beyond single rows; also while rows are read.
    """
    if path.is_dir():
        return _dataset(path)
    if not path.is_file():
        raise DataError(f"{path}: no such knowledge file")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl(path)
    if suffix in _SEPARATORS:
        return _csv(path, _SEPARATORS[suffix])
    if suffix in SUFFIXES:
        return iter_rows(path)
    kinds = ", ".join(f"*{known}" for known in SUFFIXES)
    raise DataError(f"{path}: expected a file named {kinds}, or a directory written by datasets' save_to_disk")


def _jsonl(path: Path) -> Iterator[Row]:
    index = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                yield Row(source, index, json.loads(line.decode("utf-8")))
            except ValueError as error:
                yield Row(source, index, error=f"broken JSON line ({error})")
            index += 1


def _csv(path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, delimiter=separator, strict=True)
            names = [name.strip() for name in next(table, [])]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}:1: two columns are named {twice!r}")
            start, index = table.line_num + 1, 0
            for cells in table:
                source, start = f"{path}:{start}", table.line_num + 1
                if not cells:
                    continue
                if len(cells) == len(names):
                    yield Row(source, index, dict(zip(names, cells)))
                else:
                    yield Row(source, index, error=f"expected {len(names)} columns, found {len(cells)}")
                index += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken CSV ({error}); is a quote not closed?") from None


def _dataset(path: Path) -> Iterator[Row]:
    import datasets

    try:
        table: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a dataset directory ({_first_line(error)})") from None
    if isinstance(table, datasets.DatasetDict):
        splits = ", ".join(table)
        raise DataError(
            f"{path}: has the splits {splits}; name the directory of one of them, {path / next(iter(table))}"
        )
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    for index, value in enumerate(table):
        yield Row(f"{path}:row {index + 1}", index, value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
