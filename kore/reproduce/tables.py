"""From cells to tables: means over the pre-trained worlds with 95 % intervals, and leads over KORE paired by world."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kore.metrics import hars
from kore.reproduce.studies import BY_ID, KORE, LLAVA, ROWS, TABLES, Row, rows_of
from kore.reproduce.world.new import TYPES
from kore.reproduce.world.old import DIMENSIONS
from kore.statistics import Interval, paired_seeds, seed_interval

UNTOUCHED = "untouched model"
SCORES: Mapping[str, str] = {"K.A": "ka", "K.R": "kr", "Avg": "avg", "HARS": "hars"}
_MAIN = {"CEM": "cem", "F1": "f1", **SCORES}
_WITHOUT_TABLE = ("losses", "cases")


@dataclass
class Results:
    """All that the tables are made of.

    Attributes:
        cells: Cells by row id and world.
        before: Marks of the untouched models by family and world.
    """

    cells: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    before: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    def values(self, row: str, measure: str) -> dict[int, float]:
        """A measure of a row in every world that has it.

        Args:
            row: Its id.
            measure: "ka", "kr", "avg", "cem", "f1", "hars", "tasks" for their mean, or "types:", "tasks:" or
                "dimensions:" and a name.
        """
        family = row.partition("/")[0]
        found = {}
        for world, cell in sorted(self.cells.get(row, {}).items()):
            if measure == "hars":
                before = self.before[family][world]
                found[world] = hars(cell["ka"], cell["kr"], before["ka"], before["kr"])
            else:
                found[world] = _value(cell, measure)
        return found

    def untouched(self, family: str, measure: str) -> dict[int, float]:
        """A measure of the untouched models by world; HARS has none."""
        if measure == "hars":
            return {}
        return {world: _value(marks, measure) for world, marks in sorted(self.before.get(family, {}).items())}

    def lead(self, row: str, over: str, measure: str) -> Interval | None:
        """How much higher a row is than another, paired by world; None where they share no world."""
        a, b = self.values(over, measure), self.values(row, measure)
        shared = sorted(a.keys() & b.keys())
        if not shared:
            return None
        return paired_seeds([a[world] for world in shared], [b[world] for world in shared]).difference


def _value(cell: Mapping[str, Any], measure: str) -> float:
    if measure == "tasks":
        return sum(cell["tasks"].values()) / len(cell["tasks"])
    group, _, name = measure.partition(":")
    return float(cell[group][name] if name else cell[group])


def interval(values: Mapping[int, float]) -> Interval | None:
    """Mean over worlds with its interval; None for no world."""
    return seed_interval(list(values.values())) if values else None


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        label: Of the row.
        row: Its id; empty for the untouched model.
        worlds: How many there are.
        values: By column; None where there is none.
        tuned: Whether learning rate and strength were chosen on the validation worlds.
        trainable: Parameters.
        learning_rate: Of all but the projector.
        strength: Of the method; None where it has none.
    """

    label: str
    row: str
    worlds: int
    values: dict[str, Interval | None]
    tuned: bool = True
    trainable: int | None = None
    learning_rate: float | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Out of :data:`kore.reproduce.studies.TABLES`.
        title: Its heading.
        columns: Of values.
        lines: Rows.
        missing: Labels of rows that were to be here and have no cell.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    missing: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        lines = [
            {
                **{key: value for key, value in vars(line).items() if key != "values"},
                "values": {name: None if one is None else one.as_json() for name, one in line.values.items()},
            }
            for line in self.lines
        ]
        return {"name": self.name, "title": self.title, "lines": lines, "missing": list(self.missing)}

    def as_csv(self) -> str:
        """A line a row; of every column its value and the ends of its interval."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ends = [f"{column}{end}" for column in self.columns for end in ("", " low", " high")]
        writer.writerow(["row", "label", "worlds", "tuned", "trainable", "learning_rate", "strength", *ends])
        for line in self.lines:
            numbers = [
                number
                for column in self.columns
                for one in [line.values.get(column)]
                for number in ((None, None, None) if one is None else (one.value, one.low, one.high))
            ]
            about = (line.row, line.label, line.worlds, line.tuned, line.trainable, line.learning_rate, line.strength)
            writer.writerow(["" if value is None else value for value in (*about, *numbers)])
        return text.getvalue()


def all_tables(results: Results, rows: Sequence[Row] = ROWS) -> dict[str, Table]:
    """Every table that any of these rows stands in, by name."""
    ids = {row.id for row in rows}
    found = {}
    for name, title in TABLES.items():
        chosen = [row for row in rows_of(name) if row.id in ids]
        if name in _WITHOUT_TABLE or not chosen:
            continue
        found[name] = _table(results, name, title, chosen)
    return found


def columns_of(name: str) -> dict[str, str]:
    """The columns of a table and what they measure."""
    if name == "types":
        return {f"{fact} ({category})": f"types:{fact}" for fact, category in TYPES.items()}
    if name in ("dimensions", "specific"):
        parts = {dimension: f"dimensions:{dimension}" for dimension in DIMENSIONS}
        return {**parts, "K.R": "kr"} if name == "dimensions" else {"K.A": "ka", **parts, "K.R": "kr", "Avg": "avg"}
    return dict(_MAIN)


def _table(results: Results, name: str, title: str, rows: Sequence[Row]) -> Table:
    columns = columns_of(name)
    families = list(dict.fromkeys(row.family for row in rows))
    lines = [_untouched(results, family, columns) for family in families]
    leads = {} if name in ("types", "dimensions") else {"Avg lead": "avg", "HARS lead": "hars"}
    missing = []
    for row in rows:
        if row.id not in results.cells:
            missing.append(row.label)
            continue
        lines.append(_line(results, row, columns, leads))
    parts = [column for column in columns if column not in _MAIN]
    shown = (*parts, *(column for column in SCORES if column in columns), *leads)
    return Table(
        name, title, (*shown, *(column for column in ("CEM", "F1") if column in columns)), tuple(lines), tuple(missing)
    )


def _untouched(results: Results, family: str, columns: Mapping[str, str]) -> Line:
    values = {column: interval(results.untouched(family, measure)) for column, measure in columns.items()}
    return Line(UNTOUCHED, "", len(results.before.get(family, {})), values)


def _line(results: Results, row: Row, columns: Mapping[str, str], leads: Mapping[str, str]) -> Line:
    values = {column: interval(results.values(row.id, measure)) for column, measure in columns.items()}
    kore = f"{row.family}/{KORE}"
    for column, measure in leads.items():
        values[column] = None if row.id == kore else results.lead(row.id, kore, measure)
    cells = results.cells[row.id]
    first = next(iter(cells.values()))
    return Line(
        label=row.label,
        row=row.id,
        worlds=len(cells),
        values=values,
        tuned=all(cell["tuned"] for cell in cells.values()),
        trainable=first["trainable"],
        learning_rate=first["key"]["learning_rate"],
        strength=first["key"]["strength"],
    )


def ranking(results: Results, family: str = LLAVA, measure: str = "hars") -> list[tuple[str, float]]:
    """Labels of the rows of the table of a family's methods and their mean, the highest first."""
    table = "main" if family == LLAVA else "architecture"
    means: Callable[[str], Interval | None] = lambda row: interval(results.values(row, measure))  # noqa: E731
    found = [(BY_ID[row.id].label, mean.value) for row in rows_of(table) if (mean := means(row.id)) is not None]
    return sorted(found, key=lambda pair: -pair[1])
