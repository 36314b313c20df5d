"""Two or more evaluations of the same questions: scores, differences and how sure they are, by question type."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kore import statistics
from kore.errors import DataError
from kore.evaluation.measures import Measures
from kore.evaluation.results import Answer, EvalResult
from kore.evaluation.summary import GROUPS, Run, differences, load_run, summarize
from kore.statistics import LEVEL, RESAMPLES, Interval

ALL = "all"
MARKS = ("cem", "f1", "mean")


@dataclass(frozen=True)
class Difference:
    """A result against the reference: percentage points, and p-values, that of Holm over the types of a set."""

    interval: Interval
    p: float | None
    p_holm: float | None = None

    def as_json(self) -> dict[str, float | None]:
        return {**self.interval.as_json(), "p": self.p, "p_holm": self.p_holm}


@dataclass(frozen=True)
class Line:
    """The scores of one question set, or of one type in it.

    Attributes:
        group: ``"new"`` or ``"old"``.
        set: The set's name.
        type: The question type, or ``"all"``.
        count: Questions.
        scores: By name and mark (cem, f1, mean), in percent.
        against: The same, of all but the reference.
    """

    group: str
    set: str
    type: str
    count: int
    scores: dict[str, dict[str, Interval]]
    against: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Compared:
    """What :func:`compare` found; the first of ``runs`` is the reference.

    Attributes:
        runs: By name, one run or several (seeds), restricted to the questions that are compared.
        measures: How all are marked.
        lines: Every set and its types.
        summary: K.A, K.R, Avg and HARS by name.
        against: Their differences from the reference.
        left_out: Questions that not all were asked.
    """

    runs: dict[str, list[Run]]
    measures: Measures
    lines: list[Line]
    summary: dict[str, dict[str, Interval]]
    against: dict[str, dict[str, Difference]]
    left_out: int = 0

    @property
    def reference(self) -> str:
        return next(iter(self.runs))

    def as_json(self) -> dict[str, Any]:
        """All but the answers."""
        return {
            "reference": self.reference,
            "runs": {name: len(runs) for name, runs in self.runs.items()},
            "measures": self.measures.as_json(),
            "questions_left_out": self.left_out,
            "summary": _json(self.summary),
            "summary_against_reference": _json(self.against),
            "lines": [
                {
                    "group": line.group,
                    "set": line.set,
                    "type": line.type,
                    "count": line.count,
                    "scores": _json(line.scores),
                    "against_reference": _json(line.against),
                }
                for line in self.lines
            ],
        }

    def as_csv(self) -> str:
        """A row for each set, type, name and measure."""
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        columns = ("group", "set", "type", "questions", "name", "measure", "score", "low", "high")
        table.writerow([*columns, "difference", "difference_low", "difference_high", "p", "p_holm"])
        for line in self.lines:
            where = (line.group, line.set, line.type, line.count)
            for name, marks in line.scores.items():
                for mark, score in marks.items():
                    table.writerow([*where, name, mark, *_cells(score, line.against.get(name, {}).get(mark))])
        for name, measures in self.summary.items():
            for measure, score in measures.items():
                other = self.against.get(name, {}).get(measure)
                table.writerow(["", "", ALL, "", name, measure, *_cells(score, other)])
        return file.getvalue()


def compare(
    contenders: Mapping[str, Sequence[str | os.PathLike[str] | Run]],
    untouched: Sequence[str | os.PathLike[str] | Run] = (),
    *,
    shared: bool = False,
    measures: Measures | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Compared:
    """Compare finished evaluations of the same questions with the first of them.

    Of single runs, differences have intervals by the paired bootstrap over questions; p is of McNemar's exact test for
    CEM and of a sign-flip permutation test for F1 and the mean. Where a name has several runs (seeds), question marks
    are means over them, the seeds' own noise is added to the intervals, and p comes from the same draws.

    Args:
        contenders: By name the directories of one run, or of one for each seed; the first is the reference.
        untouched: The evaluation of the model before training, for HARS.
        shared: Compare the sets and questions that all have, in place of refusing those that differ.
        measures: How to mark all answers; None: as the first was marked.
        level: Of confidence.
        resamples: Bootstrap draws.
        seed: Of everything random.

    Raises:
        DataError: Sets or questions differ; the message names the first difference.
        ArtifactError: A directory holds no finished evaluation.
    """
    runs = {name: [_loaded(one) for one in several] for name, several in contenders.items()}
    before = [_loaded(one) for one in untouched]
    everyone = [(name, run) for name, several in runs.items() for run in several]
    everyone += [("untouched", run) for run in before]
    if not runs or not all(runs.values()):
        raise DataError("compare: expected at least one evaluation")
    measures = measures or next(result.measures for _, _, result in _results(everyone[0][1]))
    alike, left_out = _alike([(name, _marked(run, measures)) for name, run in everyone], shared)
    place = iter(alike)
    runs = {name: [next(place) for _ in several] for name, several in runs.items()}
    before = list(place)
    options = {"level": level, "resamples": resamples, "seed": seed}
    first, *others = runs
    lines = [line for group, name in _sets(alike[0]) for line in _lines(runs, group, name, level, resamples, seed)]
    against = {}
    for name in others:
        found = differences(runs[first], runs[name], before, **options)  # type: ignore[arg-type]
        against[name] = {measure: Difference(one.difference, one.p) for measure, one in found.items()}
    summary = {name: summarize(several, before, **options) for name, several in runs.items()}  # type: ignore[arg-type]
    return Compared(runs, measures, _adjusted(lines), summary, against, left_out)


def names_for(directories: Sequence[Path]) -> list[str]:
    """Short names: what differs between the paths."""
    parts = [list(path.absolute().parts) for path in directories]
    if len(parts) == 1:
        return [parts[0][-1]]
    for end in (0, -1):
        while all(len(each) > 1 for each in parts) and len({each[end] for each in parts}) == 1:
            for each in parts:
                each.pop(end)
    return ["/".join(each) for each in parts]


def _loaded(one: str | os.PathLike[str] | Run) -> Run:
    return one if isinstance(one, Run) else load_run(one)


def _results(run: Run) -> Iterator[tuple[str, str, EvalResult]]:
    for group, name, result in run.sets():
        if not isinstance(result, EvalResult):
            raise DataError(f"compare: {group} set {name!r} is a bare score; expected answers to compare")
        yield group, name, result


def _sets(run: Run) -> list[tuple[str, str]]:
    return [(group, name) for group, name, _ in run.sets()]


def _rebuilt(results: Mapping[tuple[str, str], EvalResult]) -> Run:
    by_group: dict[str, dict[str, EvalResult | float]] = {group: {} for group in GROUPS}
    for (group, name), result in results.items():
        by_group[group][name] = result
    return Run(**by_group)


def _marked(run: Run, measures: Measures) -> Run:
    return _rebuilt({(group, name): result.marked(measures) for group, name, result in _results(run)})


def _alike(runs: Sequence[tuple[str, Run]], shared: bool) -> tuple[list[Run], int]:
    """The runs with the same questions in the same order, and how many questions were left out."""
    first_name, first = runs[0]
    sets = _sets(first)
    for name, run in runs[1:]:
        other = _sets(run)
        if set(other) != set(sets) and not shared:
            one, two = (", ".join(f"{group}/{each}" for group, each in each_sets) for each_sets in (sets, other))
            raise DataError(f"compare: {first_name} has the sets {one}, {name} has {two}; --shared compares the common")
        sets = [each for each in sets if each in other]
    if not sets:
        raise DataError("compare: the evaluations have no question set in common")
    rebuilt: list[dict[tuple[str, str], EvalResult]] = [{} for _ in runs]
    left_out = 0
    for group, name in sets:
        results = [getattr(run, group)[name] for _, run in runs]
        by_id = [{answer.question_id: answer for answer in result.answers} for result in results]
        everywhere = [one for one in by_id[0] if all(one in each for each in by_id)]
        if not shared:
            _check_same(f"{group}/{name}", [who for who, _ in runs], by_id)
        if not everywhere:
            raise DataError(f"compare: the evaluations have no question of {group}/{name} in common")
        left_out += len({one for each in by_id for one in each}) - len(everywhere)
        _check_texts(f"{group}/{name}", [who for who, _ in runs], by_id, everywhere)
        for place, each in enumerate(by_id):
            answers = [replace(each[one], index=i, type=by_id[0][one].type) for i, one in enumerate(everywhere)]
            rebuilt[place][group, name] = EvalResult.of(answers, results[place].measures, results[place].left_out)
    return [_rebuilt(each) for each in rebuilt], left_out


def _check_same(where: str, names: Sequence[str], by_id: Sequence[Mapping[str, Answer]]) -> None:
    for name, each in zip(names[1:], by_id[1:]):
        for has, lacks, one, other in ((by_id[0], each, names[0], name), (each, by_id[0], name, names[0])):
            only = next((question for question in has if question not in lacks), None)
            if only is not None:
                raise DataError(
                    f"compare: different questions in {where}: {only!r} was asked of {one} and not of {other} "
                    f"({len(by_id[0])} and {len(each)} questions); --shared compares those that all were asked"
                )


def _check_texts(where: str, names: Sequence[str], by_id: Sequence[Mapping[str, Answer]], ids: Sequence[str]) -> None:
    for name, each in zip(names[1:], by_id[1:]):
        for one in ids:
            mine, other = by_id[0][one], each[one]
            if (mine.question, mine.answer) != (other.question, other.answer):
                raise DataError(
                    f"compare: question {one!r} of {where} is not the same in {names[0]} and {name}: "
                    f"{mine.question[:60]!r} ({mine.answer!r}) and {other.question[:60]!r} ({other.answer!r})"
                )


def _lines(
    runs: Mapping[str, Sequence[Run]], group: str, name: str, level: float, resamples: int, seed: int
) -> Iterator[Line]:
    results = {who: [getattr(run, group)[name] for run in several] for who, several in runs.items()}
    marks = {who: np.stack([_marks(result) for result in several]) for who, several in results.items()}
    types = np.array([answer.type for answer in next(iter(results.values()))[0].answers])
    kinds = sorted(set(types.tolist()))
    for kind in [ALL, *(kinds if len(kinds) > 1 else [])]:
        chosen = np.ones(len(types), dtype=bool) if kind == ALL else types == kind
        own = {who: each[:, chosen] for who, each in marks.items()}
        first = next(iter(own))
        scores = {who: _scores(each, level, resamples, seed) for who, each in own.items()}
        against = {
            who: _differences(own[first], each, level, resamples, seed) for who, each in own.items() if who != first
        }
        yield Line(group, name, kind, int(chosen.sum()), scores, against)


def _marks(result: EvalResult) -> np.ndarray:
    """CEM, F1 and their mean (questions, 3), as fractions."""
    return np.array([(answer.cem, answer.f1, answer.mean) for answer in result.answers])


def _scores(marks: np.ndarray, level: float, resamples: int, seed: int) -> dict[str, Interval]:
    """Scores of (runs, questions, 3) marks, in percent."""
    observed = marks.mean(1)
    draws = _drawn(marks, resamples, seed)
    found = {mark: _percent(float(observed[:, i].mean()), draws[:, i], level) for i, mark in enumerate(MARKS)}
    if len(marks) == 1:
        wilson = statistics.proportion_interval(round(marks[0, :, 0].sum()), marks.shape[1], level)
        found["cem"] = Interval(100 * wilson.value, 100 * (wilson.low or 0), 100 * (wilson.high or 0))
    return found


def _differences(
    first: np.ndarray, other: np.ndarray, level: float, resamples: int, seed: int
) -> dict[str, Difference]:
    several = len(first) > 1 or len(other) > 1
    d = other.mean(0) - first.mean(0)
    draws = statistics.resampled_means(d, resamples, seed)
    if several:
        draws = draws + statistics.seed_deviations(other.mean(1), resamples, (seed, 1))
        draws = draws - statistics.seed_deviations(first.mean(1), resamples, (seed, 2))
    found = {}
    for i, mark in enumerate(MARKS):
        if several:
            p = statistics.draws_p(draws[:, i])
        elif mark == "cem":
            p = statistics.mcnemar(first[0, :, 0], other[0, :, 0])
        else:
            p = statistics.sign_flip_p(d[:, i], resamples=resamples, seed=seed)
        found[mark] = Difference(_percent(float(d[:, i].mean()), draws[:, i], level), p)
    return found


def _drawn(marks: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    draws = statistics.resampled_means(marks.mean(0), resamples, seed)
    return draws + statistics.seed_deviations(marks.mean(1), resamples, (seed, 1))


def _percent(value: float, draws: np.ndarray, level: float) -> Interval:
    return statistics.percentile_interval(100 * value, 100 * draws, level)


def _adjusted(lines: Sequence[Line]) -> list[Line]:
    """Holm's p-values over the types of each set, name and mark."""
    adjusted: dict[int, dict[str, dict[str, Difference]]] = {}
    by_set: dict[tuple[str, str], list[int]] = {}
    for index, line in enumerate(lines):
        adjusted[index] = {who: dict(marks) for who, marks in line.against.items()}
        if line.type != ALL:
            by_set.setdefault((line.group, line.set), []).append(index)
    for indices in by_set.values():
        for who in lines[indices[0]].against:
            for mark in MARKS:
                p = statistics.holm([float(lines[i].against[who][mark].p or 0.0) for i in indices])
                for i, one in zip(indices, p):
                    adjusted[i][who][mark] = replace(lines[i].against[who][mark], p_holm=one)
    return [replace(line, against=adjusted[index]) for index, line in enumerate(lines)]


def _json(values: Mapping[str, Mapping[str, Interval | Difference]]) -> dict[str, Any]:
    return {name: {mark: one.as_json() for mark, one in marks.items()} for name, marks in values.items()}


def _cells(score: Interval, other: Difference | None) -> list[float | None]:
    cells: list[float | None] = [score.value, score.low, score.high]
    if other is None:
        return [*cells, None, None, None, None, None]
    return [*cells, other.interval.value, other.interval.low, other.interval.high, other.p, other.p_holm]
