"""K.A, K.R, Avg and HARS of one or several runs, with intervals over questions, over seeds, or both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kore import statistics
from kore.artifacts import read_json
from kore.errors import ArtifactError, DataError
from kore.evaluation.measures import Measures
from kore.evaluation.results import ANSWERS, SCORES, EvalResult, load_result
from kore.metrics import knowledge_retention
from kore.statistics import LEVEL, RESAMPLES, Comparison, Interval

Over = Literal["questions", "seeds", "both"]
MEASURES = ("K.A", "K.R", "Avg", "HARS")
GROUPS = ("new", "old")


@dataclass(frozen=True)
class Run:
    """What one trained model (one seed) answered: question sets of new and of old knowledge by name.

    A number in place of a result is a score in percent, of which only the seeds tell how sure it is.
    """

    new: Mapping[str, EvalResult | float] = field(default_factory=dict)
    old: Mapping[str, EvalResult | float] = field(default_factory=dict)

    def sets(self) -> Iterator[tuple[str, str, EvalResult | float]]:
        """(group, name, result) of every set."""
        for group in GROUPS:
            for name, result in getattr(self, group).items():
                yield group, name, result


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Read what ``kore eval`` wrote, or one result of :func:`kore.evaluation.evaluate`, as the new set ``questions``.

    Raises:
        ArtifactError: It is not there, not finished or broken; the message names the file.
    """
    directory = Path(directory)
    if (directory / ANSWERS).is_file():
        return Run(new={"questions": load_result(directory)})
    if not (directory / SCORES).is_file() and (directory / "eval" / "after" / SCORES).is_file():
        raise ArtifactError(f"{directory}: a whole run; its evaluations are eval/before and eval/after in it")
    scores = read_json(directory / SCORES)
    try:
        found = {group: {name: load_result(directory / group / name) for name in scores[group]} for group in GROUPS}
    except (KeyError, TypeError):
        raise ArtifactError(
            f"{directory / SCORES}: not written by kore eval; expected the sets in new and old"
        ) from None
    return Run(**found)


def summarize(
    runs: Sequence[Run],
    untouched: Sequence[Run] = (),
    *,
    over: Over | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Every measure of a method as a mean over its runs, with an interval.

    Args:
        runs: One for each seed.
        untouched: The model before training, for HARS: one for all runs, or one for each.
        over: What the interval is over: ``"questions"`` (the bootstrap; these models, other questions), ``"seeds"``
            (Student's t; these questions, other runs) or ``"both"``; None: both where there are several runs, else
            questions. Runs that were asked the same questions share the draws, as does the untouched model.
        level: Of confidence.
        resamples: Bootstrap draws.
        seed: Of the draws.

    Returns:
        Those of K.A, K.R, Avg and HARS that the runs have sets for, in percent.

    Raises:
        DataError: The runs have different sets, or there are not as many untouched models.
    """
    observed, drawn = _measures([runs], untouched, resamples, seed)
    over = over or ("both" if len(runs) > 1 else "questions")
    result = {}
    for measure in observed[0]:
        values, draws = observed[0][measure], drawn[0][measure]
        if over == "seeds":
            result[measure] = statistics.seed_interval(list(values), level)
            continue
        spread = draws.mean(1)
        if over == "both":
            spread = spread + statistics.seed_deviations(values, resamples, (seed, 1))
        result[measure] = _interval(float(values.mean()), spread, level)
    return result


def differences(
    a: Sequence[Run],
    b: Sequence[Run],
    untouched: Sequence[Run] = (),
    *,
    paired: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Comparison]:
    """By how much every measure of b is higher than that of a, over questions, and over seeds where there are several.

    Args:
        a: The runs of one method.
        b: Those of the other. Runs of both that were asked the same questions share the bootstrap's draws.
        untouched: As in :func:`summarize`.
        paired: The runs belong together one by one, such as by pre-trained world; else their seeds are independent.
        level: Of confidence.
        resamples: Bootstrap draws.
        seed: Of the draws.

    Returns:
        For each measure the difference in percentage points, and the p-value that the draws give it.
    """
    if paired and len(a) != len(b):
        raise DataError(f"paired runs: expected as many of both, got {len(a)} and {len(b)}")
    observed, drawn = _measures([a, b], untouched, resamples, seed)
    result = {}
    for measure in observed[0]:
        first, second = (one[measure] for one in observed)
        spread = drawn[1][measure].mean(1) - drawn[0][measure].mean(1)
        if paired:
            spread = spread + statistics.seed_deviations(second - first, resamples, (seed, 1))
        else:
            spread = spread + statistics.seed_deviations(second, resamples, (seed, 1))
            spread = spread - statistics.seed_deviations(first, resamples, (seed, 2))
        value = float(second.mean() - first.mean())
        known = len(a) > 1 or len(b) > 1 or bool(np.ptp(spread))
        p = statistics.draws_p(spread) if known else None
        result[measure] = Comparison(_interval(value, spread, level), p)
    return result


def scores_of(run: Run, measures: Measures) -> dict[str, Any]:
    """What ``scores.json`` of ``kore eval`` holds: the scores of every set, K.A (the mean over the new sets of their
    mean of CEM and F1), K.R (the mean CEM over the old sets), and their intervals over questions."""
    scores: dict[str, Any] = {"measures": measures.as_json(), "new": {}, "old": {}}
    for group, name, result in run.sets():
        assert isinstance(result, EvalResult)
        scores[group][name] = {**result.scores(), "mean": result.overall.mean}
    new = [one["mean"] for one in scores["new"].values()]
    old = [one["overall"]["cem"] for one in scores["old"].values()]
    scores["ka"] = sum(new) / len(new) if new else None
    scores["kr"] = knowledge_retention(old) if old else None
    found = summarize([run])
    keys = {"ka": "K.A", "kr": "K.R"}
    scores["intervals"] = {key: [found[m].low, found[m].high] if m in found else None for key, m in keys.items()}
    return scores


def hars_of(ka: np.ndarray, kr: np.ndarray, ka0: np.ndarray, kr0: np.ndarray) -> np.ndarray:
    """:func:`kore.metrics.hars` of arrays, element by element."""
    with np.errstate(divide="ignore", invalid="ignore"):
        adaptation = 100 * (1 - np.where(ka > 0, ka0 / ka, 1.0))
        retention = np.where(kr0 > 0, 100 * kr / kr0, 100.0)
        score = 2 * adaptation * retention / (adaptation + retention)
    return np.where((ka > ka0) & (retention > 0), score, 0.0)


_Values = dict[str, np.ndarray]


def _measures(
    methods: Sequence[Sequence[Run]], untouched: Sequence[Run], resamples: int, seed: int
) -> tuple[list[_Values], list[_Values]]:
    """For each method every measure as observed (runs,), and in the bootstrap's draws (resamples, runs)."""
    for method in methods:
        if not method:
            raise DataError("expected at least one run, got none")
        if len(untouched) not in (0, 1, len(method)):
            raise DataError(f"untouched: expected one, or one for each of {len(method)} runs, got {len(untouched)}")
    everyone = [run for method in methods for run in method] + list(untouched)
    values: _Values = {}
    draws: _Values = {}
    for number, group in enumerate(GROUPS):
        names = _names(everyone, group)
        if not names:
            continue
        columns = [[getattr(run, group)[name] for run in everyone] for name in names]
        values[group] = np.mean([[_marks(one, group).mean() for one in column] for column in columns], axis=0)
        drawn = (_resampled(column, group, resamples, (seed, number, i)) for i, column in enumerate(columns))
        draws[group] = np.sum(list(drawn), axis=0) / len(columns)
    observed, resampled, start = [], [], 0
    for method in methods:
        own = list(range(start, start + len(method)))
        start += len(method)
        first = len(everyone) - len(untouched)
        before = [first + (i if len(untouched) > 1 else 0) for i in range(len(method))] if untouched else []
        observed.append(_of(values, own, before))
        resampled.append(_of(draws, own, before))
    return observed, resampled


def _names(runs: Sequence[Run], group: str) -> list[str]:
    names = list(getattr(runs[0], group))
    for run in runs[1:]:
        others = getattr(run, group)
        if set(others) != set(names):
            one, two = (", ".join(sorted(each)) or "none" for each in (names, others))
            raise DataError(f"the runs have different {group} sets, {one} and {two}; expected the same in all")
    return names


def _marks(result: EvalResult | float, group: str) -> np.ndarray:
    """The marks (questions,) in percent: the mean of CEM and F1 for new sets, CEM for old ones."""
    if not isinstance(result, EvalResult):
        return np.array([float(result)])
    return 100 * np.array([answer.mean if group == "new" else answer.cem for answer in result.answers])


def _resampled(column: Sequence[EvalResult | float], group: str, resamples: int, seed: tuple[int, ...]) -> np.ndarray:
    """Draws (resamples, runs) of the mean marks of one set; runs with the same questions share them."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, result in enumerate(column):
        ids = tuple(a.question_id for a in result.answers) if isinstance(result, EvalResult) else ()
        alike.setdefault(ids, []).append(index)
    means = np.empty((resamples, len(column)))
    for number, (ids, indices) in enumerate(alike.items()):
        marks = np.stack([_marks(column[i], group) for i in indices], axis=1)
        means[:, indices] = statistics.resampled_means(marks, resamples, (*seed, number)) if ids else marks
    return means


def _of(groups: _Values, own: list[int], before: list[int]) -> _Values:
    """The measures of the runs ``own`` (last axis), HARS over the runs ``before``."""
    found = {name: groups[group][..., own] for name, group in (("K.A", "new"), ("K.R", "old")) if group in groups}
    if len(found) == 2:
        found["Avg"] = (found["K.A"] + found["K.R"]) / 2
        if before:
            base = (groups[group][..., before] for group in GROUPS)
            found["HARS"] = hars_of(found["K.A"], found["K.R"], *base)
    return found


def _interval(value: float, draws: np.ndarray, level: float) -> Interval:
    """An interval only where the draws differ: a score without questions, of one run, has none."""
    return statistics.percentile_interval(value, draws, level) if np.ptp(draws) > 0 else Interval(value)
