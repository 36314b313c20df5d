"""Loading conversation and question files."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from kore.data.parsing import Format, ImageCheck, check_format, parse_conversation, parse_question
from kore.data.rows import Row, read_rows
from kore.data.types import BadRow, Conversation, Conversations, Question
from kore.errors import DataError

logger = logging.getLogger(__name__)

OnBadRow = Literal["fail", "skip"]
T = TypeVar("T", Conversation, Question)


def load_conversations(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    image_root: str | os.PathLike[str] | None = None,
    format: Format = "auto",
    on_bad_row: OnBadRow = "fail",
    max_samples: int | None = None,
    seed: int = 0,
    *,
    require_answer: bool = True,
    check_images: ImageCheck = "header",
) -> Conversations:
    """Read LLaVA, ShareGPT or OpenAI conversations from JSON, JSONL or Parquet files.

    Args:
        files: One file or several.
        image_root: Directory that image paths are relative to and may not leave; by default each file's own.
        format: The row format, or ``"auto"`` to tell it from each row's keys.
        on_bad_row: ``"fail"`` raises on bad rows, ``"skip"`` leaves them out and lists them in ``bad_rows``.
        max_samples: Take at most this many conversations, drawn at random with ``seed``, the same number from
            each file where there are enough. Only rows that are drawn are checked.
        require_answer: A conversation without an answer is a bad row.
        check_images: ``"header"`` reads each image's header now and decodes it when it is used; ``"decode"``
            decodes every image now, which also finds truncated files.

    Returns:
        The conversations in file order.

    Raises:
        DataError: With file and line: missing file, broken JSON, unknown role, empty answer, image missing,
            outside the root, unreadable or too large, as many ``<image>`` marks as images not found.
    """
    check_format(format)
    _check_choice("on_bad_row", on_bad_row, ("fail", "skip"))
    _check_choice("check_images", check_images, ("header", "decode"))
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples: expected at least 1, got {max_samples}")
    paths = [Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    if not paths:
        raise DataError("no data file was given")

    def parser(path: Path) -> Callable[[Row], Conversation]:
        root = _root(path, image_root)
        return lambda row: parse_conversation(row.value, root, format, require_answer, row.index, check_images)

    tables = [_Table(read_rows(path), parser(path)) for path in paths]
    if max_samples is None:
        for table in tables:
            table.take(len(table.rows), None)
    else:
        generator = random.Random(seed)
        for table in tables:
            generator.shuffle(table.order)
        _share(tables, max_samples, None if on_bad_row == "skip" else _raise)
    bad = [row for table in tables for row in table.bad]
    _report(bad, on_bad_row)
    loaded = Conversations((item for table in tables for item in table.results()), bad)
    if not loaded:
        raise DataError(f"{', '.join(map(str, paths))}: no usable row; the first problem: {bad[0]}")
    return loaded


def load_questions(
    file: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    on_bad_row: OnBadRow = "fail",
    *,
    check_images: ImageCheck = "header",
) -> list[Question]:
    """Read evaluation questions ``{question_id, image, text, answer, type}`` from JSONL, JSON or Parquet.

    Raises:
        DataError: With file and line, as :func:`load_conversations`; also for a ``question_id`` that is there twice.
    """
    _check_choice("on_bad_row", on_bad_row, ("fail", "skip"))
    path = Path(file)
    root = _root(path, image_root)
    table = _Table(read_rows(path), lambda row: parse_question(row.value, root, check_images))
    table.take(len(table.rows), None)
    questions, seen = [], set()
    for question in table.results():
        if question.question_id in seen:
            table.bad.append(BadRow(question.source, f"question_id {question.question_id!r} is there twice"))
            continue
        seen.add(question.question_id)
        questions.append(question)
    _report(table.bad, on_bad_row)
    if not questions:
        raise DataError(f"{path}: no usable row; the first problem: {table.bad[0]}")
    return questions


class _Table:
    """The rows of one file, parsed in ``order`` as far as they are asked for."""

    def __init__(self, rows: list[Row], parse: Callable[[Row], Any]) -> None:
        self.rows, self.parse = rows, parse
        self.order = list(range(len(rows)))
        self.bad: list[BadRow] = []
        self._good: dict[int, Any] = {}
        self._next = 0

    @property
    def left(self) -> int:
        return len(self.order) - self._next

    def take(self, count: int, on_bad: Callable[[BadRow], None] | None) -> int:
        """Parse until ``count`` more good rows are there or the rows end; how many there were."""
        taken = 0
        while taken < count and self.left:
            row = self.rows[self.order[self._next]]
            self._next += 1
            try:
                if row.error is not None:
                    raise DataError(row.error)
                self._good[row.index] = dataclasses.replace(self.parse(row), source=row.source)
                taken += 1
            except DataError as error:
                self.bad.append(BadRow(row.source, str(error)))
                if on_bad is not None:
                    on_bad(self.bad[-1])
        return taken

    def results(self) -> list[Any]:
        return [self._good[index] for index in sorted(self._good)]


def _share(tables: list[_Table], wanted: int, on_bad: Callable[[BadRow], None] | None) -> None:
    """Take ``wanted`` rows in all, spread evenly over the tables that still have rows."""
    while wanted > 0:
        open_tables = [table for table in tables if table.left]
        if not open_tables:
            return
        share, extra = divmod(wanted, len(open_tables))
        for number, table in enumerate(open_tables):
            wanted -= table.take(share + (number < extra), on_bad)


def _raise(bad: BadRow) -> None:
    raise DataError(f"{bad}; on_bad_row='skip' leaves bad rows out")


def _report(bad: Sequence[BadRow], on_bad_row: str) -> None:
    if not bad:
        return
    if on_bad_row == "fail":
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; on_bad_row='skip' leaves bad rows out")
    logger.warning("%d bad rows left out; the first: %s", len(bad), bad[0])


def _root(path: Path, image_root: str | os.PathLike[str] | None) -> Path:
    root = path.parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise DataError(f"image_root {root}: no such directory" if image_root else f"{path}: no such data file")
    return root


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise DataError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
