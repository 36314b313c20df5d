"""Answers that something else has given (a served model, another library, an earlier script), marked like our own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kore.artifacts import atomic_write
from kore.data.rows import read_rows
from kore.errors import DataError
from kore.evaluation.measures import Measures
from kore.evaluation.results import SCORES, STATE, Answer, EvalResult, LeftOut, Store
from kore.evaluation.summary import Run, scores_of

if TYPE_CHECKING:
    from kore.data.types import Question

_KEYS = ("prediction", "text")


def read_predictions(files: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """What was answered, by question_id, from JSONL, JSON or Parquet of ``{question_id, prediction}``.

    In place of ``prediction`` there may be ``text``, as LLaVA's scripts write it.

    Raises:
        DataError: A file is missing or broken, a row has no question_id or answer, or a question two answers.
    """
    found: dict[str, str] = {}
    for file in files:
        for row in read_rows(file):
            value = row.value if isinstance(row.value, Mapping) else {}
            text = next((value[key] for key in _KEYS if key in value), None)
            if row.error or "question_id" not in value or not isinstance(text, str):
                expected = 'expected {"question_id": …, "prediction": "…"}'
                raise DataError(f"{row.source}: {row.error or expected}, got {str(row.value)[:80]}")
            name = str(value["question_id"])
            if found.setdefault(name, text) != text:
                raise DataError(f"{row.source}: question_id {name!r} has another answer before; give each question one")
    return found


def mark(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    measures: Measures | None = None,
    on_missing: Literal["fail", "skip"] = "fail",
) -> EvalResult:
    """Mark answers that are there already.

    Args:
        questions: Whose answers they are.
        predictions: By question_id; those of other questions are left alone.
        measures: CEM and F1.
        on_missing: ``"skip"`` leaves out questions without an answer and says so in the result.

    Raises:
        DataError: A question has no answer, or with ``"skip"`` all have none.
    """
    measures = measures or Measures()
    answers, left_out = [], []
    for index, question in enumerate(questions):
        text = predictions.get(question.question_id)
        if text is not None:
            answers.append(Answer.of(index, question, text.strip(), measures))
            continue
        if on_missing == "fail":
            where = question.source or f"question {question.question_id!r}"
            raise DataError(
                f"{where}: no answer with the question_id {question.question_id!r}; "
                "with skip in place of fail such questions are left out"
            )
        left_out.append(LeftOut(question.question_id, "no answer was given"))
    if not answers:
        raise DataError(f"none of the {len(questions)} questions has an answer; expected the same question_id in both")
    return EvalResult.of(answers, measures, left_out)


def store(run: Run, directory: Path, measures: Measures) -> None:
    """Write results as ``kore eval`` does.

    Raises:
        DataError: The directory holds the answers of a model.
    """
    for group, name, result in run.sets():
        folder = directory / group / name
        if (folder / STATE).exists():
            raise DataError(f"{folder}: holds the answers of a model; expected another directory for given ones")
        assert isinstance(result, EvalResult)
        folder.mkdir(parents=True, exist_ok=True)
        Store(folder).finish(result)
    atomic_write(directory / SCORES, json.dumps(scores_of(run, measures), indent=2) + "\n")
