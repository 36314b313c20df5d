"""Build a report page block by block and write it as one HTML file."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HERE = Path(__file__).parent
_THUMBNAIL = 168


class Report:
    """A report page. Every method adds a block at the end and returns the report, so calls can be chained.

    All text is escaped; a blank line in a text begins a new paragraph.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._blocks: list[dict[str, Any]] = []

    def section(self, title: str, text: str = "") -> Report:
        """Begin a section with a heading, and optionally some paragraphs."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {block.get("anchor") for block in self._blocks}
        unique, number = anchor, 2
        while unique in taken:
            unique, number = f"{anchor}-{number}", number + 1
        return self._add("section", title=title, anchor=unique, paragraphs=_paragraphs(text))

    def text(self, text: str) -> Report:
        """Add paragraphs."""
        return self._add("text", paragraphs=_paragraphs(text))

    def tiles(self, tiles: Sequence[tuple[str, str] | tuple[str, str, str]]) -> Report:
        """Add a row of large figures, each (label, value) or (label, value, remark)."""
        return self._add("tiles", tiles=[(*tile, "")[:3] for tile in tiles])

    def facts(self, facts: Mapping[str, Any]) -> Report:
        """Add a two-column list of names and values; a None is shown as a dash."""
        return self._add("facts", facts={name: "–" if value is None else value for name, value in facts.items()})

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        caption: str = "",
        *,
        best: Mapping[str, str] | None = None,
        digits: int = 2,
    ) -> Report:
        """Add a table.

        Args:
            columns: Column headings.
            rows: One sequence a row, as long as ``columns``; floats are rounded, None is shown as a dash.
            caption: A line under the table.
            best: For each column named here, ``"max"`` or ``"min"``: the best of its numbers is set in bold
                (ties after rounding all are).
            digits: Decimal places of floats.

        Raises:
            ValueError: A row's length is not the number of columns, or ``best`` names no column.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table: expected {len(columns)} cells a row, got {len(row)}: {list(row)!r}")
        bold: dict[int, str] = {}
        for column, which in (best or {}).items():
            if column not in columns or which not in ("max", "min"):
                raise ValueError(f"table: best: expected a column of {list(columns)} with max or min, got {column!r}")
            index = list(columns).index(column)
            numbers = [row[index] for row in rows if _is_number(row[index])]
            if len(numbers) > 1:
                bold[index] = _cell(max(numbers) if which == "max" else min(numbers), digits)
        numeric = [all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))]
        cells = [
            [
                {
                    "text": _cell(value, digits),
                    "bold": i in bold and _is_number(value) and _cell(value, digits) == bold[i],
                    "number": numeric[i],
                }
                for i, value in enumerate(row)
            ]
            for row in rows
        ]
        headings = [{"text": name, "number": numeric[i]} for i, name in enumerate(columns)]
        return self._add("table", columns=headings, rows=cells, caption=caption)

    def figure(self, figure: Figure, caption: str = "") -> Report:
        """Add a matplotlib figure as inline SVG; made by :mod:`kore.report.figures`, it follows dark mode."""
        from kore.report.figures import to_svg

        return self._add("figure", svg=to_svg(figure), caption=caption)

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> Report:
        """Add sample answers side by side.

        Args:
            samples: Mappings with ``question``, ``expected`` (a string or a list of accepted ones), ``answers``
                ({name: text}), and optionally ``image`` (a path, embedded as a thumbnail), ``correct``
                ({name: bool}) and ``label`` (a small heading).
        """
        prepared = []
        for sample in samples:
            expected = sample["expected"]
            correct = sample.get("correct", {})
            prepared.append(
                {
                    "image": _thumbnail(sample.get("image")),
                    "label": sample.get("label", ""),
                    "question": str(sample["question"]).replace("<image>", "").strip(),
                    "expected": expected if isinstance(expected, str) else " / ".join(expected),
                    "answers": [(name, text, correct.get(name)) for name, text in sample["answers"].items()],
                }
            )
        return self._add("samples", samples=prepared)

    def pictures(self, pictures: Sequence[tuple[str | os.PathLike[str], str]]) -> Report:
        """Add a contact sheet of (path, caption); the pictures are embedded as thumbnails, missing ones left out."""
        shown = [{"image": _thumbnail(path), "caption": caption} for path, caption in pictures]
        return self._add("pictures", pictures=[picture for picture in shown if picture["image"]])

    def conversations(self, conversations: Sequence[Mapping[str, Any]]) -> Report:
        """Add conversations side by side.

        Args:
            conversations: Mappings with ``turns``, (question, answer) pairs, and optionally ``image`` (a path,
                embedded as a thumbnail) and ``label`` (a small heading).
        """
        prepared = [
            {"image": _thumbnail(each.get("image")), "label": each.get("label", ""), "turns": list(each["turns"])}
            for each in conversations
        ]
        return self._add("conversations", conversations=prepared)

    def code(self, text: str, summary: str) -> Report:
        """Add preformatted text, folded away behind a summary line."""
        return self._add("code", text=text, summary=summary)

    def html(self) -> str:
        """The page as text."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        contents = [block for block in self._blocks if block["kind"] == "section"]
        return environment.get_template("page.html.j2").render(
            title=self.title,
            subtitle=self.subtitle,
            blocks=self._blocks,
            contents=contents if len(contents) > 3 else [],
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page atomically; returns its path."""
        atomic_write(path, self.html())
        return Path(path)

    def _add(self, kind: str, **content: Any) -> Report:
        self._blocks.append({"kind": kind, **content})
        return self


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return f"{value:,}" if _is_number(value) else str(value)


def _thumbnail(path: str | os.PathLike[str] | None) -> str | None:
    """The image as a small data URI, JPEG or PNG, whichever is smaller, or None when there is none to show."""
    if path is None or not Path(path).is_file():
        return None
    from PIL import Image

    from kore.errors import DataError
    from kore.fetch import open_image

    try:
        picture = open_image(path)
    except DataError:
        return None
    if max(picture.size) < _THUMBNAIL // 2:
        scale = _THUMBNAIL // max(picture.size)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82, "optimize": True})):
        buffer = io.BytesIO()
        picture.save(buffer, kind.upper(), **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda one: len(encoded[one]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"
