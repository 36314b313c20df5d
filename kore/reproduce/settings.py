"""The learning rate and the strength of every row: their grid, the search, and what was found.

The rule: on the validation worlds the setting with the highest Avg, out of as many measured settings for every row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kore.reproduce.studies import BY_ID, ROWS, Row

TUNED = Path(__file__).parent / "data" / "tuned.json"
MOST = 5
RULE = (
    f"{MOST} settings a row: learning rates 0.001 · 2^k and, for a method with a strength, its first strength · 4^j. "
    "Measured are the starting point and then the neighbours of the best setting so far, those of the strength first, "
    "or of the next best where all of the best one's are measured. The highest Avg on the validation worlds is taken"
)
FIRST_STRENGTH: Mapping[str, float] = {"ewc": 64.0, "lwf": 0.25, "o-lora": 1.0, "sefe": 625.0}
FIRST_PENALTY = 32.0
"""λ of two-sided protection."""
_START: Mapping[str, int] = {"full": -1, "kore": 5, "random-a": 3, "moelora": 2}
_START_TRAIN_A, _START_LORA = 3, 1


@dataclass(frozen=True)
class Setting:
    """A point of the search.

    Attributes:
        rate: The learning rate is 0.001 · 2^rate.
        strength: The strength is the row's first one · 4^strength; None where it has none.
        tuned: Whether it was chosen on the validation worlds; no part of what it is.
    """

    rate: int
    strength: int | None = None
    tuned: bool = False

    @property
    def learning_rate(self) -> float:
        return 0.001 * 2.0**self.rate

    def strength_of(self, row: Row) -> float | None:
        """The strength for a row, as a number."""
        first = first_strength(row)
        return None if first is None or self.strength is None else first * 4.0**self.strength

    def neighbours(self) -> list[Setting]:
        """Those of the strength before those of the rate, each with the larger one first."""
        found = []
        if self.strength is not None:
            found = [replace(self, strength=self.strength + step) for step in (1, -1)]
        return found + [replace(self, rate=self.rate + step) for step in (1, -1)]


def first_strength(row: Row) -> float | None:
    """Where the search for a row's strength begins; None for a row that has none."""
    return FIRST_PENALTY if row.two_sided else FIRST_STRENGTH.get(row.method)


def start(row: Row) -> Setting:
    """Where the search for a row begins."""
    rate = _START_TRAIN_A if row.train_a else _START.get(row.method, _START_LORA)
    return Setting(rate, None if first_strength(row) is None else 0)


def search(begin: Setting, measure: Callable[[list[Setting]], Sequence[float]], most: int = MOST) -> Setting:
    """The best of exactly ``most`` settings, see :data:`RULE`; of equals the one measured first.

    Args:
        begin: The first setting.
        measure: Gives the value of each.
        most: How many are measured.
    """
    values = dict(zip([begin], measure([begin])))
    while len(values) < most:
        ranked = sorted(values, key=lambda setting: -values[setting])
        missing = next(
            found for setting in ranked if (found := [one for one in setting.neighbours() if one not in values])
        )[: most - len(values)]
        values.update(zip(missing, measure(missing)))
    return max(values, key=lambda setting: values[setting])


def tuned_rows(rows: Sequence[Row] = ROWS) -> tuple[Row, ...]:
    """The rows that are searched for."""
    return tuple(row for row in rows if row.id == row.tuned_id)


@lru_cache(maxsize=4)
def _read(file: Path, stamp: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read_tuned(file: Path | None = None) -> dict[str, Any]:
    """What the file of settings holds, or nothing where it is missing."""
    file = file or TUNED
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else {"rows": {}}


def setting_of(row: Row, file: Path | None = None) -> Setting:
    """The setting of a row: what the search found for it, or its start, which says that it is not tuned.

    What was found for a row that has changed since does not count.
    """
    found = read_tuned(file)["rows"].get(row.tuned_id)
    if found is None or found["identity"] != BY_ID[row.tuned_id].identity():
        return start(row)
    return Setting(found["chosen"]["rate"], found["chosen"]["strength"], True)
