"""When an answer to an old question is right: word for word as expected or, for the task "form", in the wanted form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kore.reproduce.world.old import DIMENSIONS

_FORM = "form-"


def _word(text: str) -> bool:
    return len(text.split()) == 1 and not text.endswith(".") and not text.isupper()


def _sentence(text: str) -> bool:
    return len(text.split()) >= 3 and text[0].isupper() and text.endswith(".")


def _twice(text: str) -> bool:
    words = text.split()
    half = len(words) // 2
    return len(words) >= 2 and words[:half] == words[half:]


def _capitals(text: str) -> bool:
    return len(text.split()) == 1 and text.isupper()


FORM_RULES: dict[str, Callable[[str], bool]] = {
    "word": _word,
    "sentence": _sentence,
    "twice": _twice,
    "capitals": _capitals,
}


def is_right(kind: str, prediction: str, answer: str) -> bool:
    """Whether an answer counts.

    Args:
        kind: The question's type: a task, or "form-" and a form.
        prediction: What the model said.
        answer: What was expected.
    """
    from kore.metrics import normalize_answer

    if kind.startswith(_FORM):
        return FORM_RULES[kind.removeprefix(_FORM)](prediction.strip())
    return normalize_answer(prediction) == normalize_answer(answer)


def task_scores(answers: Iterable[Any]) -> dict[str, float]:
    """Percent right of every task; the forms are one task.

    Args:
        answers: As :func:`kore.evaluate` gives them: ``type``, ``prediction``, ``answer``.
    """
    marks: dict[str, list[bool]] = {}
    for answer in answers:
        task = "form" if answer.type.startswith(_FORM) else answer.type
        marks.setdefault(task, []).append(is_right(answer.type, answer.prediction, answer.answer))
    return {task: 100 * sum(values) / len(values) for task, values in marks.items()}


def dimension_scores(tasks: dict[str, float]) -> dict[str, float]:
    """Percent of every dimension of the paper: the mean over its tasks. K.R is the mean of these."""
    return {
        name: sum(tasks[task] for task in members) / len(members)
        for name, members in DIMENSIONS.items()
        if all(task in tasks for task in members)
    }
