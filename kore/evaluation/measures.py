"""How an answer is marked, and how the marks of many become a score with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kore.errors import ConfigError
from kore.metrics import CEM_RULES, F1_RULES, CemRule, F1Rule, cover_exact_match
from kore.metrics import f1 as token_f1

if TYPE_CHECKING:
    from kore.evaluation.results import Answer


@dataclass(frozen=True)
class Measures:
    """Which forms of CEM and F1 are meant: see :func:`kore.metrics.cover_exact_match` and :func:`kore.metrics.f1`."""

    cem: CemRule = "vqa"
    f1: F1Rule = "multiset"

    def __post_init__(self) -> None:
        for name, value, known in (("cem", self.cem, CEM_RULES), ("f1", self.f1, F1_RULES)):
            if value not in known:
                raise ConfigError(f"{name}: expected {' or '.join(known)}, got {value!r}")

    @classmethod
    def read(cls, stored: Any) -> Measures:
        """From what ``scores.json`` holds; a file that says nothing was marked as was usual before it did."""
        return cls(**stored) if isinstance(stored, dict) else cls(cem="squad")

    def mark(self, prediction: str, accepted: str | list[str]) -> tuple[float, float]:
        """CEM and F1 of one answer, as fractions."""
        return float(cover_exact_match(prediction, accepted, self.cem)), token_f1(prediction, accepted, self.f1)

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def intervals(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """95 % intervals over questions, in percent: Wilson's of CEM, by bootstrap of F1 and of the mean of both."""
    import numpy as np

    from kore.statistics import bootstrap_interval, proportion_interval

    marks = np.array([(a.cem, a.f1) for a in answers])
    found = {
        "cem": proportion_interval(int(marks[:, 0].sum()), len(marks)),
        "f1": bootstrap_interval(marks[:, 1]),
        "mean": bootstrap_interval(marks.mean(1)),
    }
    return {name: [100 * float(one.low or 0), 100 * float(one.high or 0)] for name, one in found.items()}
