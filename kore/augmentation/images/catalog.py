"""The images of a local folder or saved data set, each with the words that describe it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kore.artifacts import atomic_write, file_sha256
from kore.augmentation.images.words import printable
from kore.augmentation.types import Candidate
from kore.errors import DataError, KoreError
from kore.fetch import resolve_image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_METADATA = ("metadata.jsonl", "metadata.csv")
_LICENCE, _AUTHOR, _PAGE = ("licence", "license"), ("author", "artist", "credit"), ("page", "source", "url")
_TITLE = ("title", "caption", "text", "name")


@dataclass(frozen=True)
class Entry:
    """One image of a catalogue: its place there, and what is said about it."""

    place: str
    words: str
    title: str = ""
    licence: str = "unknown"
    author: str = ""
    page: str = ""


class Catalog(Protocol):
    """Images by number."""

    @property
    def entries(self) -> Sequence[Entry]: ...

    def sha256(self, index: int) -> str:
        """The hash of the image's file. Raises DataError where it is missing, OSError where it cannot be read."""

    def candidate(self, index: int) -> Candidate:
        """The image as a local file. Raises DataError where it is missing."""


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if isinstance(value := row.get(name), str) and value.strip():
            return printable(value)[:300]
    return ""


def _entry(place: str, row: Mapping[str, Any], skip: Sequence[str] = ()) -> Entry:
    said = [value for name, value in row.items() if isinstance(value, str) and name not in (*skip, *_LICENCE, *_PAGE)]
    stem = printable(Path(place).stem.replace("_", " ").replace("-", " "))
    return Entry(
        place=place,
        words=" ".join([stem, *said]),
        title=_first(row, _TITLE) or stem,
        licence=_first(row, _LICENCE) or "unknown",
        author=_first(row, _AUTHOR),
        page=_first(row, _PAGE),
    )


def _metadata(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, row) of an image folder's metadata file."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    for number, row in _table(file, content) if file.suffix == ".csv" else _lines(file, content):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{file}, line {number}: expected file_name, the image's path beside this file")
        yield row["file_name"], {key: value for key, value in row.items() if key != "file_name"}


def _table(file: Path, content: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not CSV ({error})") from None


def _lines(file: Path, content: str) -> Iterator[tuple[int, Any]]:
    # Texts may hold other ends of lines, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number}: not JSON ({error})") from None


class FolderCatalog:
    """The images below a folder, described by their names and by metadata.jsonl or metadata.csv beside them.

    Raises:
        DataError: There is no image, or a metadata file is malformed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.name.startswith(".")
        )
        if not names:
            raise DataError(f"{folder}: no image ({', '.join(_SUFFIXES)}) lies below it")
        rows: dict[str, dict[str, Any]] = {}
        for metadata in sorted(path for name in _METADATA for path in folder.rglob(name)):
            base = metadata.parent.relative_to(folder)
            rows.update({(base / name).as_posix(): row for name, row in _metadata(metadata)})
        self.entries = [_entry(name, rows.get(name, {})) for name in names]

    def sha256(self, index: int) -> str:
        return file_sha256(resolve_image(self.entries[index].place, self._folder))

    def candidate(self, index: int) -> Candidate:
        entry = self.entries[index]
        path = resolve_image(entry.place, self._folder)
        return Candidate(None, path, entry.page or entry.place, entry.title, entry.licence, entry.author)


class DatasetCatalog:
    """The images of a Hugging Face data set on disk: saved by ``save_to_disk``, or parquet files.

    Rows stay on disk; an image becomes a file below ``scratch`` when it is asked for.

    Raises:
        DataError: It cannot be read, or has no image column.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path, self._scratch = path, scratch
        self._rows, self._column = _open_dataset(path, scratch)
        others = [name for name, feature in self._rows.features.items() if getattr(feature, "dtype", "") == "string"]
        self.entries = [_entry(f"row {number}", row) for number, row in enumerate(_texts(self._rows, others))]

    def _image(self, index: int) -> bytes | Path:
        """The image of a row: itself, or the file that the row names."""
        image = self._rows[index][self._column] or {}
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        if not image.get("path"):
            raise DataError(f"{self._path}, {self.entries[index].place}: it has no image")
        return resolve_image(image["path"], self._path if self._path.is_dir() else self._path.parent)

    def sha256(self, index: int) -> str:
        image = self._image(index)
        return file_sha256(image) if isinstance(image, Path) else hashlib.sha256(image).hexdigest()

    def candidate(self, index: int) -> Candidate:
        entry, data = self.entries[index], self._image(index)
        if isinstance(data, Path):
            path = data
        else:
            path = self._scratch / f"{hashlib.sha256(data).hexdigest()}.image"
            if not path.is_file() or path.stat().st_size != len(data):
                atomic_write(path, data, durable=False)
        place = f"{self._path.name}, {entry.place}"
        return Candidate(None, path, entry.page or place, entry.title, entry.licence, entry.author)


def _texts(rows: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The text columns of all rows; a thousand rows at a time, which is many times faster than one by one."""
    if not columns:
        yield from ({} for _ in range(len(rows)))
        return
    for batch in rows.select_columns(list(columns)).iter(batch_size=1000):
        yield from (dict(zip(columns, values)) for values in zip(*(batch[name] for name in columns)))


def _open_dataset(path: Path, scratch: Path) -> tuple[Any, str]:
    import datasets

    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            rows = datasets.load_from_disk(str(path))
        else:
            files = sorted(str(file) for file in path.rglob("*.parquet")) if path.is_dir() else [str(path)]
            rows = datasets.Dataset.from_parquet(files, cache_dir=str(scratch / "datasets"))
        if isinstance(rows, datasets.DatasetDict):
            rows = datasets.concatenate_datasets([rows[split] for split in sorted(rows)])
    except KoreError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable data set ({type(error).__name__}: {error})") from None
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise DataError(f"{path}: expected an image column, found {', '.join(rows.column_names) or 'none'}")
    return rows.cast_column(columns[0], datasets.Image(decode=False)), columns[0]


def open_catalog(path: Path, scratch: Path) -> Catalog:
    """The catalogue of a folder of images or a data set.

    Raises:
        DataError: There is nothing at ``path``, or it cannot be read as either.
    """
    if path.is_file() and path.suffix == ".parquet":
        return DatasetCatalog(path, scratch)
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder of images, a saved data set, or a parquet file")
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if saved or any(path.rglob("*.parquet")):
        return DatasetCatalog(path, scratch)
    return FolderCatalog(path)
