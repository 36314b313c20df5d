"""From cells to the table: means and spreads over seeds, in the terminal and as rows for the report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from kore.demo.methods import Method
from kore.metrics import hars

UNTOUCHED = "untouched model"
COLUMNS = ("K.A", "K.R", "Avg", "HARS")


class Mean(float):
    """A mean over seeds that prints with its standard deviation: 83.2 ± 1.1; alone for a single seed."""

    spread: float | None

    @classmethod
    def of(cls, values: list[float]) -> Mean:
        mean = cls(statistics.mean(values))
        mean.spread = statistics.stdev(values) if len(values) > 1 else None
        return mean

    def __format__(self, spec: str) -> str:
        text = super().__format__(spec)
        return text if self.spread is None else f"{text} ± {self.spread:{spec}}"


@dataclass(frozen=True)
class Row:
    """One line of the table; HARS is None for the untouched model."""

    label: str
    trainable: int
    learning_rate: float | None
    values: dict[str, Mean | None]


def rows(methods: dict[str, Method], cells: dict[str, list[dict[str, Any]]], before: list[dict[str, Any]]) -> list[Row]:
    """The untouched model, then every method.

    Args:
        cells: By method, one cell a seed.
        before: The untouched model's marks, one a seed, in the same order.
    """
    table = [Row(UNTOUCHED, 0, None, {**_marks(before), "HARS": None})]
    for name, method in methods.items():
        scores = [hars(c["ka"], c["kr"], b["ka"], b["kr"]) for c, b in zip(cells[name], before)]
        rate, trainable = cells[name][0]["key"]["learning_rate"], cells[name][0]["trainable"]
        table.append(Row(method.label, trainable, rate, {**_marks(cells[name]), "HARS": Mean.of(scores)}))
    return table


def _marks(cells: list[dict[str, Any]]) -> dict[str, Mean | None]:
    return {
        column: Mean.of([cell[key] for cell in cells]) for column, key in (("K.A", "ka"), ("K.R", "kr"), ("Avg", "avg"))
    }


def best(table: list[Row], column: str) -> str:
    """Label of the method with the highest mean in a column, the untouched model aside."""
    return max((row for row in table[1:]), key=lambda row: row.values[column] or float("-inf")).label


def as_json(table: list[Row]) -> list[dict[str, Any]]:
    """The rows with mean and spread of every value."""
    return [
        {
            "method": row.label,
            "trained_parameters": row.trainable,
            "learning_rate": row.learning_rate,
            **{
                column: None if value is None else {"mean": float(value), "spread": value.spread}
                for column, value in row.values.items()
            },
        }
        for row in table
    ]


def print_table(table: list[Row], title: str, console: Any) -> None:
    """The table in the terminal, best means in bold."""
    from rich.table import Table

    view = Table(title=title, title_justify="left", title_style="bold")
    view.add_column("method")
    for heading in ("trained", "learning rate", *COLUMNS):
        view.add_column(heading, justify="right")
    highest = {column: best(table, column) for column in COLUMNS}
    for row in table:
        cells = []
        for column in COLUMNS:
            value = row.values[column]
            text = "–" if value is None else f"{value:.1f}"
            cells.append(f"[bold]{text}[/bold]" if highest[column] == row.label else text)
        rate = "–" if row.learning_rate is None else f"{row.learning_rate:g}"
        view.add_row(row.label, f"{row.trainable / 1000:.0f} k" if row.trainable else "–", rate, *cells)
    console.print(view)
