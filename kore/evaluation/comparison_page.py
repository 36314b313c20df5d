"""The page of one evaluation or of several compared: tables, a figure by question type, answers side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.evaluation.comparing import ALL, Compared, Difference, Line
from kore.evaluation.results import Answer, EvalResult
from kore.statistics import Interval

_MOST_BARS = 20
_ANSWERS = 8
_PICTURES = {"mean": "mean of CEM and F1", "cem": "CEM", "f1": "F1"}


def write_comparison(compared: Compared, path: str | os.PathLike[str]) -> Path:
    """Write the page, and ``compare.json`` and ``compare.csv`` beside it; returns the page's path."""
    path = Path(path)
    atomic_write(path.parent / "compare.json", json.dumps(compared.as_json(), indent=2) + "\n")
    atomic_write(path.parent / "compare.csv", compared.as_csv())
    return write_page(compared, path)


def write_page(compared: Compared, path: str | os.PathLike[str]) -> Path:
    """Write the page alone."""
    from kore.report import Report

    names = list(compared.runs)
    title = " and ".join(names) if len(names) < 3 else f"{len(names)} evaluations"
    measures = compared.measures
    report = Report(title, f"CEM after the normalisation of {measures.cem}, F1 of {measures.f1}s of words")
    _summary(report, compared)
    for group, name in dict.fromkeys((line.group, line.set) for line in compared.lines):
        lines = [line for line in compared.lines if (line.group, line.set) == (group, name)]
        report.section(f"{group}: {name}", _counted(compared, group, name))
        _table(report, compared, lines)
        _bars(report, lines)
        _case_study(report, compared, group, name)
    report.section("How this was computed", _method(compared))
    return report.write(path)


def _summary(report: Any, compared: Compared) -> None:
    measures = list(next(iter(compared.summary.values())))
    if len(compared.runs) == 1:
        found = compared.summary[compared.reference]
        report.tiles([(measure, f"{one.value:.2f}", _range(one)) for measure, one in found.items()])
        return
    report.section("Result", "In percent, with 95 % intervals.")
    rows = [[name, *(_cell(found[measure]) for measure in measures)] for name, found in compared.summary.items()]
    report.table(["", *measures], rows)
    rows = [
        [name, *(_change(found[measure]) for measure in measures), *(_p(found[measure].p) for measure in measures)]
        for name, found in compared.against.items()
    ]
    columns = [f"against {compared.reference}", *measures, *(f"p, {measure}" for measure in measures)]
    report.table(columns, rows, "Percentage points more than the reference.")


def _table(report: Any, compared: Compared, lines: Sequence[Line]) -> None:
    names = list(compared.runs)
    if len(names) == 1:
        rows = [[line.type, line.count, *(_cell(one) for one in line.scores[names[0]].values())] for line in lines]
        report.table(["type", "questions", "CEM", "F1", "mean"], rows)
        return
    mark = "cem" if lines[0].group == "old" else "mean"
    others = names[1:]
    heads = [
        part for name in others for part in (f"{name} − {names[0]}", "p", *(["p, Holm"] if len(lines) > 1 else []))
    ]
    rows = []
    for line in lines:
        row: list[Any] = [line.type, line.count, *(line.scores[name][mark].value for name in names)]
        for name in others:
            one = line.against[name][mark]
            row += [_change(one), _p(one.p), *([_p(one.p_holm)] if len(lines) > 1 else [])]
        rows.append(row)
    report.table(
        ["type", "questions", *names, *heads], rows, f"{_PICTURES[mark]}, percent; all marks are in compare.csv."
    )


def _bars(report: Any, lines: Sequence[Line]) -> None:
    from kore.report import figures

    types = sorted((line for line in lines if line.type != ALL), key=lambda line: -line.count)
    if not types:
        return
    shown, mark = types[:_MOST_BARS], "cem" if lines[0].group == "old" else "mean"
    scores = {
        name: {line.type: (one.value, one.low, one.high) for line in shown for one in [line.scores[name][mark]]}
        for name in shown[0].scores
    }
    left = f", the {len(shown)} most frequent of {len(types)}" if len(types) > len(shown) else ""
    report.figure(figures.type_bars(scores, _PICTURES[mark]), f"By question type{left}; lines are 95 % intervals.")


def _case_study(report: Any, compared: Compared, group: str, name: str) -> None:
    """Answers side by side: with two or more, the questions where they differ most, both ways."""
    results = {who: getattr(runs[0], group)[name] for who, runs in compared.runs.items()}
    answers = results[compared.reference].answers
    if len(results) == 1:
        step = max(1, len(answers) // _ANSWERS)
        report.text("Answers, evenly spaced through the set, not chosen. The mark is CEM.")
        report.samples([_sample(results, index) for index in range(0, len(answers), step)][:_ANSWERS])
        return
    gains = _gains(compared, group, name)
    order = sorted(range(len(answers)), key=lambda index: (-abs(gains[index]), index))
    for better, words in ((1, "do better than"), (-1, "do worse than")):
        chosen = _varied([answers[i] for i in order if gains[i] * better > 0])
        if chosen:
            report.text(
                f"Questions on which the others {words} {compared.reference}, those with the largest difference "
                "first, of each type in turn. The mark is CEM."
            )
            report.samples([_sample(results, answer.index) for answer in chosen])


def _gains(compared: Compared, group: str, name: str) -> list[float]:
    """For each question, how much more the others got than the reference, on average."""
    sums: dict[str, list[float]] = {}
    for who, runs in compared.runs.items():
        marks = [[answer.mean for answer in getattr(run, group)[name].answers] for run in runs]
        sums[who] = [sum(each) / len(runs) for each in zip(*marks)]
    first = sums.pop(compared.reference)
    return [sum(each) / len(sums) - own for own, each in zip(first, zip(*sums.values()))]


def _varied(answers: Sequence[Answer]) -> list[Answer]:
    """The first answers of every type in turn."""
    by_type: dict[str, list[Answer]] = {}
    for answer in answers:
        by_type.setdefault(answer.type, []).append(answer)
    rounds = [each[place] for place in range(_ANSWERS) for each in by_type.values() if place < len(each)]
    return rounds[:_ANSWERS]


def _sample(results: dict[str, EvalResult], index: int) -> dict[str, Any]:
    said = {name: result.answers[index] for name, result in results.items()}
    one = next(iter(said.values()))
    return {
        "label": " · ".join(part for part in (one.type, one.question_id) if part),
        "image": one.image,
        "question": one.question,
        "expected": one.answer,
        "answers": {name: answer.prediction for name, answer in said.items()},
        "correct": {name: bool(answer.cem) for name, answer in said.items()},
    }


def _counted(compared: Compared, group: str, name: str) -> str:
    result = getattr(compared.runs[compared.reference][0], group)[name]
    words = [f"{len(result.answers)} questions."]
    missing = sorted(
        {one.question_id for runs in compared.runs.values() for r in runs for one in _left_out(r, group, name)}
    )
    if missing:
        words.append(f"Could not be asked: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}.")
    return " ".join(words)


def _left_out(run: Any, group: str, name: str) -> list[Any]:
    return list(getattr(run, group)[name].left_out)


def _method(compared: Compared) -> str:
    several = {name: len(runs) for name, runs in compared.runs.items() if len(runs) > 1}
    text = (
        "K.A is the mean of CEM and F1 over new questions, K.R the mean CEM over old ones, Avg their mean, HARS their "
        "harmonic balance over the untouched model. Intervals are bootstrap percentiles over questions; those of CEM "
        "in one run are Wilson's."
    )
    if len(compared.runs) > 1:
        text += (
            " Differences are paired by question. p: McNemar's exact test for CEM, a sign-flip permutation test for F1 "
            "and the mean, the bootstrap's draws for K.A, K.R, Avg and HARS. p, Holm: adjusted for the number of types."
        )
    if several:
        runs = ", ".join(f"{name} {count}" for name, count in several.items())
        text += (
            f" Runs: {runs}. Marks are means over them, their own spread is added to the intervals by Student's t, "
            "and p comes from the same draws."
        )
    if compared.left_out:
        text += f" {compared.left_out} questions were left out, which not all were asked."
    return text


def _cell(one: Interval) -> str:
    return f"{one.value:.2f}{f' [{one.low:.1f}, {one.high:.1f}]' if one.low is not None else ''}"


def _range(one: Interval) -> str:
    return "" if one.low is None else f"95 %: {one.low:.2f} to {one.high:.2f}"


def _change(one: Difference) -> str:
    at = one.interval
    text = f"{at.value:+.2f}{f' [{at.low:+.1f}, {at.high:+.1f}]' if at.low is not None else ''}"
    return text.replace("-", "−")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
