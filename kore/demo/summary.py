"""From cells to the table: means and spreads over seeds, in the terminal and as rows for the report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from kore.demo.methods import Method
from kore.metrics import hars

UNTOUCHED = "untouched model"
COLUMNS = ("K.A", "K.R", "Avg", "HARS")


@dataclass(frozen=True)
class Row:
    """One line of the table; each value is (mean, spread over seeds), the spread None for a single seed."""

    label: str
    trainable: int
    learning_rate: float | None
    values: dict[str, tuple[float, float | None] | None]


def _mean(values: list[float]) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def rows(methods: dict[str, Method], cells: dict[str, list[dict[str, Any]]], before: list[dict[str, Any]]) -> list[Row]:
    """The untouched model, then every method.

    Args:
        cells: By method, one cell a seed.
        before: The untouched model's marks, one a seed, in the same order.
    """
    table = [
        Row(
            UNTOUCHED,
            0,
            None,
            {
                "K.A": _mean([b["ka"] for b in before]),
                "K.R": _mean([b["kr"] for b in before]),
                "Avg": _mean([b["avg"] for b in before]),
                "HARS": None,
            },
        )
    ]
    for name, method in methods.items():
        scores = [hars(c["ka"], c["kr"], b["ka"], b["kr"]) for c, b in zip(cells[name], before)]
        values = {column: _mean([c[key] for c in cells[name]]) for column, key in zip(COLUMNS, ("ka", "kr", "avg"))}
        rate = cells[name][0]["key"]["learning_rate"]
        table.append(Row(method.label, cells[name][0]["trainable"], rate, {**values, "HARS": _mean(scores)}))
    return table


def text(value: tuple[float, float | None] | None) -> str:
    """'83.2 ± 1.1', '83.2' for a single seed, a dash for nothing."""
    if value is None:
        return "–"
    mean, spread = value
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def best(table: list[Row], column: str) -> str:
    """Label of the method with the highest mean in a column, the untouched model aside."""
    return max(
        (row for row in table if row.label != UNTOUCHED),
        key=lambda row: (row.values[column] or (float("-inf"), None))[0],
    ).label


def print_table(table: list[Row], title: str, console: Any) -> None:
    """The table in the terminal, best means in bold."""
    from rich.table import Table

    view = Table(title=title, title_justify="left", title_style="bold")
    view.add_column("method")
    for heading in ("trained", "learning rate", *COLUMNS):
        view.add_column(heading, justify="right")
    for row in table:
        cells = [
            f"[bold]{text(row.values[column])}[/bold]" if best(table, column) == row.label else text(row.values[column])
            for column in COLUMNS
        ]
        rate = "–" if row.learning_rate is None else f"{row.learning_rate:g}"
        view.add_row(row.label, f"{row.trainable / 1000:.0f} k" if row.trainable else "–", rate, *cells)
    console.print(view)
