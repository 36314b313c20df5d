"""Answers, their scores, and both on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write, read_json
from kore.errors import ArtifactError
from kore.evaluation.measures import Measures, intervals
from kore.metrics import knowledge_adaptation

if TYPE_CHECKING:
    from kore.data.types import Question

ANSWERS, SCORES, STATE = "answers.jsonl", "scores.json", "state.json"


@dataclass(frozen=True)
class Answer:
    """One question, what the model said, and its marks (fractions)."""

    index: int
    question_id: str
    type: str
    image: str | None
    question: str
    answer: str | list[str]
    prediction: str
    cem: float
    f1: float

    @classmethod
    def of(cls, index: int, question: Question, prediction: str, measures: Measures) -> Answer:
        """What was said to a question, marked; ``index``: the question's place."""
        accepted = question.answer if isinstance(question.answer, str) else list(question.answer)
        cem, f1 = measures.mark(prediction, accepted)
        return cls(
            index=index,
            question_id=question.question_id,
            type=question.type,
            image=None if question.image is None else str(question.image),
            question=question.text,
            answer=accepted,
            prediction=prediction,
            cem=cem,
            f1=f1,
        )

    @property
    def mean(self) -> float:
        """Mean of CEM and F1."""
        return (self.cem + self.f1) / 2


@dataclass(frozen=True)
class LeftOut:
    """A question that could not be asked, and why."""

    question_id: str
    reason: str


@dataclass(frozen=True)
class Score:
    """Means over ``count`` questions, in percent."""

    count: int
    cem: float
    f1: float

    @property
    def mean(self) -> float:
        """Mean of CEM and F1: K.A when the questions ask for new knowledge."""
        return knowledge_adaptation(self.cem, self.f1)

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Score:
        answers = list(answers)
        count = len(answers)
        return cls(count, 100 * sum(a.cem for a in answers) / count, 100 * sum(a.f1 for a in answers) / count)


@dataclass(frozen=True)
class EvalResult:
    """Scores over all questions and by question type (in percent), and the answers in the order asked."""

    overall: Score
    by_type: dict[str, Score]
    answers: list[Answer]
    measures: Measures = field(default_factory=Measures)
    left_out: list[LeftOut] = field(default_factory=list)

    @classmethod
    def of(
        cls, answers: Sequence[Answer], measures: Measures | None = None, left_out: Sequence[LeftOut] = ()
    ) -> EvalResult:
        by_type = {one: Score.of(group) for one, group in _by_type(answers).items()}
        return cls(Score.of(answers), by_type, list(answers), measures or Measures(), list(left_out))

    def marked(self, measures: Measures) -> EvalResult:
        """The same answers, marked by other measures."""
        if measures == self.measures:
            return self
        answers = []
        for one in self.answers:
            cem, f1 = measures.mark(one.prediction, one.answer)
            answers.append(replace(one, cem=cem, f1=f1))
        return EvalResult.of(answers, measures, self.left_out)

    def scores(self) -> dict[str, Any]:
        """The scores as JSON-serialisable values, each with its 95 % interval over questions."""
        by_type = {name: _described(self.by_type[name], group) for name, group in _by_type(self.answers).items()}
        return {
            "measures": self.measures.as_json(),
            "overall": _described(self.overall, self.answers),
            "by_type": by_type,
            **({"left_out": [asdict(one) for one in self.left_out]} if self.left_out else {}),
        }


def load_result(directory: str | os.PathLike[str]) -> EvalResult:
    """Read a finished evaluation. Raises ArtifactError naming the file when it is missing or broken."""
    directory = Path(directory)
    scores = read_json(directory / SCORES)
    try:
        answers = [Answer(**json.loads(line)) for line in read_lines(directory / ANSWERS)]
        left_out = [LeftOut(**one) for one in scores.get("left_out", [])]
        return EvalResult.of(answers, Measures.read(scores.get("measures")), left_out)
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ArtifactError(f"{directory / ANSWERS}: cannot be read ({error}); evaluate again") from None


def read_lines(file: Path) -> list[str]:
    """The lines of a JSONL file that are not empty; only a newline ends one."""
    return [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]


class Store:
    """The answers of one evaluation on disk.

    The first process keeps ``answers.jsonl``, process k appends to ``answers.k.jsonl``; the first takes in what is
    there of the others before anything is asked and at the end. The lines of a batch are written in one call.
    """

    def __init__(self, directory: str | os.PathLike[str], rank: int = 0) -> None:
        self.directory = Path(directory)
        self.file = self.directory / (ANSWERS if rank == 0 else f"answers.{rank}.jsonl")

    def open(self, state: dict[str, Any], count: int) -> dict[int, str]:
        """The predictions that are there by index of ``count`` questions, those of other settings thrown away.

        A line cut short by a kill is dropped. For the first process only, before the others append.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / STATE).is_file() or read_json(self.directory / STATE) != state:
            for file in (self.directory / SCORES, *self._files()):
                file.unlink(missing_ok=True)
            atomic_write(self.directory / STATE, json.dumps(state, indent=2) + "\n")
        found: dict[int, dict[str, Any]] = {}
        for file in self._files():
            for line in read_lines(file):
                try:
                    row = asdict(Answer(**json.loads(line)))
                except (ValueError, TypeError):
                    continue
                if isinstance(row["index"], int) and 0 <= row["index"] < count and isinstance(row["prediction"], str):
                    found[row["index"]] = row
        self._replace(_line(found[index]) for index in sorted(found))
        return {index: row["prediction"] for index, row in found.items()}

    def append(self, answers: Sequence[Answer]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(_line(asdict(answer)) for answer in answers))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, result: EvalResult) -> None:
        """Write all answers in order, then ``scores.json``, which marks the evaluation as complete."""
        self._replace(_line(asdict(answer)) for answer in result.answers)
        atomic_write(self.directory / SCORES, json.dumps(result.scores(), indent=2) + "\n")

    def _files(self) -> list[Path]:
        return [file for file in sorted(self.directory.glob("answers*.jsonl")) if file.is_file()]

    def _replace(self, lines: Iterable[str]) -> None:
        atomic_write(self.directory / ANSWERS, "".join(lines))
        for file in self._files():
            if file.name != ANSWERS:
                file.unlink()


def _line(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


def _described(score: Score, answers: Sequence[Answer]) -> dict[str, Any]:
    return {**asdict(score), "mean": score.mean, "intervals": intervals(answers)}


def _by_type(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    types = sorted({answer.type for answer in answers})
    return {one: [answer for answer in answers if answer.type == one] for one in types}
