"""A retention suite that needs no engine: local sets of questions, answered and marked here.

A set is one JSONL file, or a JSON array, whose first row describes it:

    {"benchmark": {"name": "Signs", "dimension": "OCR", "kind": "ocr", "score": "anls", "prompt": "Answer briefly."}}
    {"question_id": "1", "image": "signs/1.png", "text": "What does the sign say?", "answer": ["Stop", "STOP"]}

``kind`` is multiple-choice, yes-no, ocr, short-answer or open; ``score``, the metric that counts, and ``prompt``, a
line put below every question, have defaults (:data:`PROMPTS`, :data:`kore.retention.marks.SCORES`). Every row has
``question_id``, ``text`` and ``answer``, and may have ``image`` (a path below the file's folder) and ``type``. A
multiple-choice row has ``options``, its answer is a letter or the text of one; the answer of a yes-no row is yes or no,
and ``pair`` names the questions that count together in accuracy+ and MME's score. Other answers may be lists, of which
the best counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kore import statistics
from kore.artifacts import atomic_write, file_sha256, read_json
from kore.errors import ArtifactError, DataError
from kore.metrics import normalize_answer
from kore.retention import marks
from kore.retention.benchmarks import DIMENSIONS, key_of
from kore.statistics import LEVEL, RESAMPLES, Interval

if TYPE_CHECKING:
    import torch

    from kore.data import Encoder
    from kore.data.rows import Row
    from kore.data.types import Question
    from kore.evaluation import ProcessorPrompts

_LETTER = "Answer with the option's letter from the given choices directly."
_WORD = "Answer the question using a single word or phrase."
PROMPTS = {"multiple-choice": _LETTER, "yes-no": _WORD, "ocr": _WORD, "short-answer": _WORD, "open": ""}
"""The line below a question, as LLaVA's own evaluations have it."""
SUITE, MARKED = "suite.json", "marked.jsonl"
_HEADER = ("name", "dimension", "kind", "score", "prompt")


@dataclass(frozen=True)
class Item:
    """One question: its text as asked, and what is right.

    Attributes:
        question_id: Its name in the file.
        image: The image, if it has one.
        text: With options and prompt.
        answers: Accepted answers; of a yes-no question ``yes`` or ``no``, of a choice the right option's text.
        type: Of the question, "all" where the file says nothing.
        options: Of a multiple-choice question.
        right: The index of the right option.
        pair: The name of its group for accuracy+; "" where it has none.
        source: File and line.
    """

    question_id: str
    image: Path | None
    text: str
    answers: tuple[str, ...]
    type: str = "all"
    options: tuple[str, ...] = ()
    right: int = -1
    pair: str = ""
    source: str = ""

    def question(self) -> Question:
        """The question as :func:`kore.evaluation.evaluate` asks it."""
        from kore.data.types import Question

        answer: Any = self.answers[0] if len(self.answers) == 1 else self.answers
        return Question(self.question_id, self.image, self.text, answer, self.type, self.source)


@dataclass(frozen=True)
class Set:
    """A set of questions of the offline suite."""

    file: Path
    name: str
    dimension: str
    kind: str
    score: str
    items: tuple[Item, ...]

    @property
    def key(self) -> str:
        return key_of(self.name)


@dataclass(frozen=True)
class SetScore:
    """What a model scored on a set: the score with its interval, and every metric of the kind, all in percent."""

    name: str
    dimension: str
    kind: str
    score: str
    count: int
    interval: Interval
    metrics: dict[str, float]


@dataclass(frozen=True)
class SuiteScores:
    """Scores of all sets, their means by dimension, and K.R, the mean of the sets; bootstrap over questions."""

    sets: list[SetScore]
    dimensions: dict[str, Interval]
    kr: Interval

    def as_json(self) -> dict[str, Any]:
        return {
            "sets": {
                one.name: {
                    "dimension": one.dimension,
                    "kind": one.kind,
                    "metric": one.score,
                    "count": one.count,
                    "score": one.interval.as_json(),
                    "metrics": one.metrics,
                }
                for one in self.sets
            },
            "dimensions": {name: interval.as_json() for name, interval in self.dimensions.items()},
            "kr": self.kr.as_json(),
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> SuiteScores:
        """Back from :meth:`as_json`."""
        sets = [
            SetScore(
                name=name,
                dimension=one["dimension"],
                kind=one["kind"],
                score=one["metric"],
                count=one["count"],
                interval=Interval(**one["score"]),
                metrics=one["metrics"],
            )
            for name, one in value["sets"].items()
        ]
        dimensions = {name: Interval(**interval) for name, interval in value["dimensions"].items()}
        return cls(sets, dimensions, Interval(**value["kr"]))


def load_set(file: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None) -> Set:
    """Read and check a set of questions.

    Args:
        file: ``.jsonl``, or ``.json`` with an array.
        image_root: Where images lie; by default the file's folder.

    Raises:
        DataError: File, header, row or image is wrong; the message names the line.
    """
    from kore.data.rows import read_rows

    path = Path(file)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{path}: expected a file named *.jsonl or *.json")
    header, *rows = read_rows(path)
    about = _header(header)
    if not rows:
        raise DataError(f"{path}: the set has no questions")
    root = path.parent if image_root is None else Path(image_root)
    items = tuple(_item(row, about, root) for row in rows)
    _check_ids(items)
    if about["score"] in ("accuracy_plus", "mme"):
        alone = next((item for item in items if not item.pair), None)
        if alone is not None:
            raise DataError(f"{alone.source}: score {about['score']!r} needs 'pair' in every row, this has none")
    return Set(path, about["name"], about["dimension"], about["kind"], about["score"], items)


def load_suite(files: Iterable[str | os.PathLike[str]], image_root: str | os.PathLike[str] | None = None) -> list[Set]:
    """Read several sets. Raises DataError as :func:`load_set`, and where two have one name."""
    sets = [load_set(file, image_root) for file in files]
    if not sets:
        raise DataError("offline suite: expected at least one file")
    seen: dict[str, Set] = {}
    for one in sets:
        if one.key in seen:
            raise DataError(f"{one.file}: its name {one.name!r} is that of {seen[one.key].file}; give each its own")
        seen[one.key] = one
    return sets


def run_suite(
    model: torch.nn.Module,
    encoder: Encoder | ProcessorPrompts,
    sets: Sequence[Set],
    output: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = True,
) -> SuiteScores:
    """Ask all questions and mark the replies.

    Each set has a folder below ``output`` with ``answers.jsonl`` and, once done, ``marked.jsonl``: how each reply was
    read, and its mark. A stopped run goes on where it was; answers of another model or question are not kept
    (:func:`kore.evaluation.evaluate`). ``suite.json`` holds the scores.

    Raises:
        DataError: A question cannot be asked.
    """
    from kore.evaluation import evaluate
    from kore.processes import is_main_process

    output = Path(output)
    found: list[tuple[Set, marks.Marked]] = []
    for one in sets:
        result = evaluate(
            model,
            encoder,
            [item.question() for item in one.items],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            output=output / one.key,
            progress=progress,
        )
        replies = [answer.prediction for answer in result.answers]
        found.append((one, marks.mark(one.kind, one.score, one.items, replies)))
        if is_main_process():
            _write_marked(output / one.key / MARKED, one, replies, found[-1][1])
    scores = summarize(found, level=level, resamples=resamples, seed=seed)
    if is_main_process():
        files = {one.name: file_sha256(one.file) for one in sets}
        atomic_write(output / SUITE, json.dumps({**scores.as_json(), "files": files}, indent=2) + "\n")
    return scores


def load_suite_scores(directory: str | os.PathLike[str]) -> SuiteScores:
    """Read ``suite.json``. Raises ArtifactError naming the file when it is missing or broken."""
    file = Path(directory) / SUITE
    value = read_json(file)
    try:
        return SuiteScores.of_json(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error!r}); run the suite again") from None


def summarize(
    found: Sequence[tuple[Set, marks.Marked]], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> SuiteScores:
    """Scores and means with intervals; the questions of every set are drawn again by themselves."""
    sets, values, draws = [], [], []
    for number, (one, marked) in enumerate(found):
        value = 100 * float(marked.statistic(marked.units.mean(0)))
        drawn = 100 * marked.statistic(statistics.resampled_means(marked.units, resamples, (seed, number)))
        interval = statistics.percentile_interval(value, drawn, level)
        sets.append(SetScore(one.name, one.dimension, one.kind, one.score, len(marked.marks), interval, marked.metrics))
        values.append(value)
        draws.append(drawn)

    def mean(chosen: Sequence[int]) -> Interval:
        value = sum(values[i] for i in chosen) / len(chosen)
        return statistics.percentile_interval(value, np.mean([draws[i] for i in chosen], axis=0), level)

    named = {one.dimension for one in sets}
    order = [*(name for name in DIMENSIONS if name in named), *sorted(named - set(DIMENSIONS))]
    dimensions = {name: mean([i for i, one in enumerate(sets) if one.dimension == name]) for name in order}
    return SuiteScores(sets, dimensions, mean(range(len(sets))))


def _write_marked(file: Path, one: Set, replies: Sequence[str], marked: marks.Marked) -> None:
    rows = (
        {"question_id": item.question_id, "type": item.type, "answer": _shown(item), "reply": reply}
        | ({} if read is None and one.kind not in ("multiple-choice", "yes-no") else {"read": read})
        | {"mark": mark}
        for item, reply, read, mark in zip(one.items, replies, marked.read, marked.marks)
    )
    atomic_write(file, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _shown(item: Item) -> Any:
    if item.options:
        return marks.LETTERS[item.right]
    return item.answers[0] if len(item.answers) == 1 else list(item.answers)


def _header(row: Row) -> dict[str, str]:
    about = row.value.get("benchmark") if isinstance(row.value, Mapping) else None
    if not isinstance(about, Mapping):
        raise DataError(f'{row.source}: expected the set\'s description first: {{"benchmark": {{"name": ..., ...}}}}')
    unknown = sorted(set(about) - set(_HEADER))
    if unknown:
        raise DataError(f"{row.source}: unknown key {unknown[0]!r} in 'benchmark'; known: {', '.join(_HEADER)}")
    for key in ("name", "dimension", "kind"):
        if not isinstance(about.get(key), str) or not about[key].strip():
            raise DataError(f"{row.source}: 'benchmark' needs {key!r}, a text, found {about.get(key)!r:.60}")
    kind = about["kind"]
    if kind not in marks.SCORES:
        raise DataError(f"{row.source}: kind: expected one of {', '.join(marks.SCORES)}, got {kind!r}")
    score = about.get("score", marks.SCORES[kind][0])
    if score not in marks.SCORES[kind]:
        raise DataError(f"{row.source}: score of {kind}: expected {' or '.join(marks.SCORES[kind])}, got {score!r}")
    prompt = about.get("prompt", PROMPTS[kind])
    if not isinstance(prompt, str):
        raise DataError(f"{row.source}: prompt: expected a text, got {prompt!r:.60}")
    return {"name": about["name"], "dimension": about["dimension"], "kind": kind, "score": score, "prompt": prompt}


def _item(row: Row, about: Mapping[str, str], root: Path) -> Item:
    try:
        return _parsed(row, about, root)
    except DataError as error:
        raise DataError(f"{row.source}: {error}") from error.__cause__


def _parsed(row: Row, about: Mapping[str, str], root: Path) -> Item:
    from kore.data.parsing import parse_question

    value = row.value
    if row.error is not None:
        raise DataError(row.error)
    if not isinstance(value, Mapping):
        raise DataError(f"expected an object, found {type(value).__name__}")
    answers = _texts("answer", value.get("answer"))
    question = parse_question({**value, "answer": answers[0]}, root)
    if question.history:
        raise DataError("'history' is not known here; expected single questions")
    kind, text = about["kind"], question.text
    options: tuple[str, ...] = ()
    right = -1
    if kind == "multiple-choice":
        options = _options(value.get("options"))
        right = _right(answers, options)
        answers = (options[right],)
        text = "\n".join([text, *(f"{letter}. {option}" for letter, option in zip(marks.LETTERS, options))])
    elif value.get("options") is not None:
        raise DataError(f"'options' belong to multiple-choice, this set is {kind}")
    elif kind == "yes-no":
        answers = (answers[0].strip().lower().rstrip("."),)
        if answers[0] not in ("yes", "no"):
            raise DataError(f"'answer': expected yes or no, got {value.get('answer')!r:.60}")
    if about["prompt"]:
        text = f"{text}\n{about['prompt']}"
    pair = value.get("pair")
    return Item(
        question.question_id,
        question.image,
        text,
        answers,
        question.type,
        options,
        right,
        "" if pair is None else str(pair),
        row.source,
    )


def _texts(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    values = value if isinstance(value, list) else [value]
    texts = tuple(str(one) for one in values if isinstance(one, str | int | float) and str(one).strip())
    if not texts or len(texts) < len(values):
        raise DataError(f"{key!r}: expected text that is not empty, or a list of such, found {value!r:.60}")
    return texts


def _options(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        if list(value) != list(marks.LETTERS[: len(value)]):
            raise DataError(
                f"'options': expected the letters A, B, C, ... in order, found {', '.join(map(str, value))}"
            )
        value = list(value.values())
    if not isinstance(value, list):
        raise DataError(f"'options': expected a list of texts, found {value!r:.60}")
    texts = _texts("options", value)
    if not 2 <= len(texts) <= len(marks.LETTERS):
        raise DataError(f"'options': expected 2 to {len(marks.LETTERS)}, found {len(texts)}")
    if len(set(texts)) < len(texts):
        raise DataError("'options': two are the same")
    return texts


def _right(answers: Sequence[str], options: Sequence[str]) -> int:
    """The index of the right option, given by its letter or its text."""
    if len(answers) != 1:
        raise DataError(f"'answer': expected one option, found {len(answers)}")
    answer = answers[0].strip()
    letters = marks.LETTERS[: len(options)]
    by_letter = letters.find(answer) if len(answer) == 1 else -1
    by_text = next((i for i, option in enumerate(options) if option.strip() == answer), -1)
    if by_text < 0:
        alike = [i for i, option in enumerate(options) if normalize_answer(option) == normalize_answer(answer) != ""]
        by_text = alike[0] if len(alike) == 1 else -1
    if by_letter >= 0 and by_text >= 0 and by_letter != by_text:
        raise DataError(
            f"'answer': {answer!r} is the letter of one option and the text of another; reorder the options"
        )
    if by_letter < 0 and by_text < 0:
        raise DataError(f"'answer': expected a letter of {letters} or the text of an option, got {answer!r:.60}")
    return by_letter if by_letter >= 0 else by_text


def _check_ids(items: Sequence[Item]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        if item.question_id in seen:
            raise DataError(f"{item.source}: question_id {item.question_id!r} is that of {seen[item.question_id]}")
        seen[item.question_id] = item.source
