"""Pieces of knowledge from a file: every row checked once, then read again as often as it is needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from kore.artifacts import atomic_write
from kore.augmentation.reading import stream_rows
from kore.augmentation.types import Category, KnowledgeItem
from kore.data.rows import Row
from kore.data.types import IMAGE_MARK, BadRow
from kore.errors import ConfigError, DataError
from kore.fetch import image_size, resolve_image
from kore.pipeline.stage import counted

_log = logging.getLogger(__name__)

COLUMNS = ("id", "category", "type", "title", "name", "text", "image", "facts")
OnBadRow = Literal["fail", "skip"]
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_LONGEST_ID = 100


class Knowledge:
    """The good rows of a knowledge file, in order. Each pass reads the file anew, so that its size does not matter.

    Attributes:
        path: The file.
        bad_rows: The rows that are left out.
    """

    def __init__(self, path: Path, parser: _Parser, count: int, bad: Mapping[int, BadRow], last: int) -> None:
        self.path = path
        self.bad_rows = tuple(bad.values())
        self._parser, self._count, self._bad, self._last = parser, count, frozenset(bad), last
        self._signature = _signature(path)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[KnowledgeItem]:
        """The items. Raises DataError when the file has changed since it was checked."""
        if _signature(self.path) != self._signature:
            raise DataError(f"{self.path}: the file changes while it is read; start again when it is finished")
        for row in stream_rows(self.path):
            if row.index > self._last:
                return
            if row.index not in self._bad:
                yield self._parser.item(row, check_image=False)


def load_knowledge(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    on_bad_row: OnBadRow = "fail",
    *,
    columns: Mapping[str, str] | None = None,
    max_items: int | None = None,
    extract: Path | None = None,
) -> Knowledge:
    """Check a knowledge file: JSONL, JSON, CSV, TSV, Parquet or a directory of a Hugging Face dataset.

    A row has ``type``, ``title`` (news) or ``name`` (entity), ``text``, and may have ``id``, ``category``, ``image``
    and ``facts`` (a mapping, or one as JSON text). Other columns are left alone.

    Args:
        path: The file or directory.
        image_root: Folder that image paths are relative to and may not leave; by default that of the file.
        on_bad_row: ``"fail"`` raises on bad rows, ``"skip"`` leaves them out and lists them in ``bad_rows``.
        columns: The file's name of a column for ours, such as ``{"title": "headline"}``.
        max_items: Take only so many good rows, the first ones.
        extract: Folder for images that are in the rows themselves, as in Parquet; written as they are read.

    Raises:
        DataError: With file and line: a missing or empty column, an id that is there twice or is no file name, an
            image that is missing, outside the root or unreadable, facts that are no mapping.
        ConfigError: ``columns`` names a column that knowledge does not have.
    """
    path = Path(path)
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row: expected fail or skip, got {on_bad_row!r}")
    if max_items is not None and max_items < 1:
        raise ConfigError(f"max_items: expected at least 1, got {max_items}")
    root = Path(image_root) if image_root is not None else path if path.is_dir() else path.parent
    if image_root is not None and not root.is_dir():
        raise DataError(f"image_root {root}: no such directory")
    parser = _Parser(root, _columns(columns or {}), extract)
    seen: dict[str, str] = {}
    bad: dict[int, BadRow] = {}
    last = -1
    for row in stream_rows(path):
        if max_items is not None and len(seen) == max_items:
            break
        last = row.index
        try:
            item = parser.item(row, check_image=True)
            folded = item.id.casefold()
            if folded in seen:
                raise DataError(f"id {item.id!r} is there twice, first at {seen[folded]}")
            place = row.source.rpartition(":")[2]
            seen[folded] = f"line {place}" if place.isdigit() else place
        except DataError as error:
            bad[row.index] = BadRow(row.source, str(error))
    if last < 0:
        raise DataError(f"{path}: the file has no rows")
    _report(bad, on_bad_row)
    if not seen:
        raise DataError(f"{path}: no usable row; the first problem: {next(iter(bad.values()))}")
    return Knowledge(path, parser, len(seen), bad, last)


class _Parser:
    """From one row to an item. Problems are DataErrors without a place; the caller adds it."""

    def __init__(self, root: Path, columns: Mapping[str, str], extract: Path | None) -> None:
        self.root, self.columns, self.extract = root, columns, extract

    def item(self, row: Row, check_image: bool) -> KnowledgeItem:
        if row.error is not None:
            raise DataError(row.error)
        if not isinstance(row.value, Mapping):
            raise DataError(f"expected an object with columns, found {type(row.value).__name__}")
        values = {ours: row.value.get(theirs) for ours, theirs in self.columns.items()}
        item = KnowledgeItem(
            id=self._id(values["id"], row.index),
            category=self._category(values),
            type=self._text("type", values["type"], row.value),
            title="",
            text=self._text("text", values["text"], row.value),
            image=self._image(values["image"], check_image),
            facts=_facts(values["facts"]),
            source=row.source,
        )
        return dataclasses.replace(item, title=self._title(item.category, values))

    def _text(self, name: str, value: Any, row: Mapping[str, Any]) -> str:
        column = self.columns[name]
        if column not in row:
            shown = ", ".join(map(repr, list(row)[:12]))
            raise DataError(f"no column {column!r}; the row has {shown}. columns.{name} names another one")
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{column!r}: expected text that is not empty, found {value!r:.60}")
        return _unmarked(column, value.strip())

    def _id(self, value: Any, index: int) -> str:
        if value is None or value == "":
            return f"{index + 1:06d}"
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{self.columns['id']!r}: expected a name or a number, found {value!r:.60}")
        name = str(value)
        if _NOT_IN_NAMES.search(name) or name != name.strip() or name.startswith(".") or name.endswith("."):
            raise DataError(f"{self.columns['id']!r}: {name!r:.60} cannot be the name of a folder")
        if len(name.encode()) > _LONGEST_ID:
            raise DataError(f"{self.columns['id']!r}: {name!r:.60} is longer than {_LONGEST_ID} bytes")
        return name

    def _category(self, values: Mapping[str, Any]) -> Category:
        value = values["category"]
        if value is None or value == "":
            named, titled = _filled(values["name"]), _filled(values["title"])
            if named == titled:
                found = "both" if named else "neither"
                raise DataError(
                    f"expected {self.columns['title']!r} for news or {self.columns['name']!r} for an entity, found "
                    f"{found}; a {self.columns['category']!r} of news or entity tells which"
                )
            return "entity" if named else "news"
        word = value.strip().lower() if isinstance(value, str) else value
        if word == "news":
            return "news"
        if word == "entity":
            return "entity"
        raise DataError(f"{self.columns['category']!r}: expected news or entity, found {value!r:.60}")

    def _title(self, category: Category, values: Mapping[str, Any]) -> str:
        first, second = ("title", "name") if category == "news" else ("name", "title")
        name = first if _filled(values[first]) else second
        value = values[name]
        if not _filled(value):
            raise DataError(f"{self.columns[first]!r}: expected text that is not empty, found {value!r:.60}")
        return _unmarked(self.columns[name], " ".join(value.split()))

    def _image(self, value: Any, check: bool) -> Path | None:
        if isinstance(value, Mapping) and value.get("bytes"):
            path = self._extracted(value["bytes"])
        else:
            if isinstance(value, Mapping):
                value = value.get("path")
            if value is None or value == "":
                return None
            if not isinstance(value, str):
                raise DataError(f"{self.columns['image']!r}: expected the path of a file, found {type(value).__name__}")
            path = resolve_image(value, self.root)
        if check:
            image_size(path)
        return path

    def _extracted(self, data: bytes) -> Path:
        """The file of an image that the row itself holds, written where it is not there yet."""
        if self.extract is None:
            raise DataError(f"{self.columns['image']!r}: the row holds the image itself; load_knowledge needs extract")
        path = self.extract / f"{hashlib.sha256(data).hexdigest()}.image"
        if not path.is_file():
            atomic_write(path, data)
        return path


def _columns(given: Mapping[str, str]) -> dict[str, str]:
    for name in given:
        if name not in COLUMNS:
            raise ConfigError(f"columns: knowledge has no column {name!r}; it has {', '.join(COLUMNS)}")
    return {name: given.get(name, name) for name in COLUMNS}


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _unmarked(name: str, text: str) -> str:
    if IMAGE_MARK in text:
        raise DataError(f"{name!r}: the text holds {IMAGE_MARK}, which marks the place of an image; take it out")
    return text


def _facts(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"'facts': expected a mapping as JSON text ({error})") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise DataError(f"'facts': expected a mapping of attributes to values, found {type(value).__name__}")
    facts = {}
    for name, fact in value.items():
        if fact is None or fact == "" or fact == []:
            continue
        parts = fact if isinstance(fact, list | tuple) else [fact]
        if not all(isinstance(part, str | int | float) for part in parts) or not str(name).strip():
            raise DataError(f"'facts': expected text or numbers for {name!r}, found {fact!r:.60}")
        facts[str(name).strip()] = _unmarked("facts", ", ".join(str(part).strip() for part in parts))
    return facts


def _signature(path: Path) -> tuple[int, int] | None:
    if path.is_dir():
        return None
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _report(bad: Mapping[int, BadRow], on_bad_row: str) -> None:
    if not bad:
        return
    first = next(iter(bad.values()))
    if on_bad_row == "fail":
        more = f" (and {counted(len(bad) - 1, 'more bad row')})" if len(bad) > 1 else ""
        raise DataError(f"{first}{more}; on_bad_row='skip' leaves bad rows out")
    _log.warning("%s left out; the first: %s", counted(len(bad), "bad row"), first)
