"""How replies of the offline suite are read and marked: the chosen option, yes or no, edit distance, whole words."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kore.metrics import cover_exact_match, f1, normalize_answer

if TYPE_CHECKING:
    from kore.retention.offline import Item

LETTERS = string.ascii_uppercase
ANLS_THRESHOLD = 0.5

_LEADING = re.compile(r"^[\s(\[*\"']*([A-Z])(?:[\s\"']*$|[)\].:,*\"'])")
_STATED = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*[(\[*\"']*([A-Za-z])(?:$|[)\].,:;*\"'\s])", re.I)
_ALONE = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_SENTENCE_WORDS = re.compile(r"(?<![\w'’])(?:A|I)\s+[a-z]")
_YES_NO = re.compile(r"\b(yes|no|not)\b|n['’]t\b", re.IGNORECASE)

Statistic = Callable[[np.ndarray], np.ndarray]


def chosen_option(reply: str, options: Sequence[str]) -> int | None:
    """The index of the option that a reply chooses, or None where it cannot be told.

    In this order: the text of one option and nothing else; a letter in front ("B", "(B)", "B. because"); a letter
    after "answer", "option" or "choice"; a capital letter standing alone, if there is one only and it does not begin
    a sentence as the article or pronoun does; the text of an option inside the reply, the longest where one is part
    of another.
    """
    said = normalize_answer(reply)
    same = [index for index, option in enumerate(options) if said and normalize_answer(option) == said]
    if len(same) == 1:
        return same[0]
    letters = LETTERS[: len(options)]
    lone = reply.strip()
    if len(lone) == 1 and lone.upper() in letters:
        return letters.index(lone.upper())
    for found in (_LEADING.match(reply), _last(_STATED.finditer(reply))):
        if found is not None and found[1].upper() in letters:
            return letters.index(found[1].upper())
    alone = {letter for letter in _ALONE.findall(_SENTENCE_WORDS.sub(" ", reply)) if letter in letters}
    if len(alone) == 1:
        return letters.index(alone.pop())
    return _named(reply, options)


def _last(found: Any) -> Any:
    last = None
    for last in found:  # noqa: B007
        pass
    return last


def _named(reply: str, options: Sequence[str]) -> int | None:
    inside = [i for i, option in enumerate(options) if cover_exact_match(reply, option, "squad")]
    longest = [
        i for i in inside if not any(j != i and cover_exact_match(options[j], options[i], "squad") for j in inside)
    ]
    return longest[0] if len(longest) == 1 else None


def said_yes(reply: str) -> bool | None:
    """Whether a reply says yes; None where it says neither, or both without beginning with one of them.

    "not" and words in "n't" are a no, as in the scorer of POPE, but silence is no yes.
    """
    words = reply.strip().lower().lstrip("\"'(*[ ")
    for word, meaning in (("yes", True), ("no", False)):
        if re.match(rf"{word}\b", words):
            return meaning
    found = {match[0].lower() == "yes" for match in _YES_NO.finditer(reply)}
    return found.pop() if len(found) == 1 else None


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def anls(reply: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al. 2019): the best over the answers of

    1 − d where d < threshold, else 0; d = edit distance / length of the longer, in lower case with single spaces.
    """
    said = _plain(reply)
    best = 0.0
    for answer in map(_plain, answers):
        longer = max(len(said), len(answer))
        distance = edit_distance(said, answer) / longer if longer else 0.0
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class Marked:
    """What the replies of a benchmark are worth.

    Attributes:
        read: How each reply was understood: the option's letter, yes, no; None where it was not, or nothing is read.
        marks: A number for each question, 0 to 1.
        metrics: Every metric of the kind, in percent.
        units: (n, m), what the bootstrap draws from: questions, or groups of questions marked together.
        statistic: From means (..., m) of the units to the score, 0 to 1.
    """

    read: list[str | None]
    marks: list[float]
    metrics: dict[str, float]
    units: np.ndarray
    statistic: Statistic


def mark(kind: str, score: str, items: Sequence[Item], replies: Sequence[str]) -> Marked:
    """Mark the replies to a benchmark's questions; ``score`` is one of ``SCORES[kind]``."""
    return _KINDS[kind](score, items, replies)


def _multiple_choice(score: str, items: Sequence[Item], replies: Sequence[str]) -> Marked:
    chosen = [chosen_option(reply, item.options) for item, reply in zip(items, replies)]
    right = [float(choice is not None and choice == item.right) for item, choice in zip(items, chosen)]
    read = [None if choice is None else LETTERS[choice] for choice in chosen]
    metrics = {"accuracy": _percent(right), "unread": _percent([one is None for one in read])}
    return _plain_mean(read, right, metrics)


def _yes_no(score: str, items: Sequence[Item], replies: Sequence[str]) -> Marked:
    said = [said_yes(reply) for reply in replies]
    gold = [item.answers[0] == "yes" for item in items]
    read = [None if one is None else "yes" if one else "no" for one in said]
    right = [float(one is not None and one == truth) for one, truth in zip(said, gold)]
    # For F1 the question is whether the reply says yes, so one that says nothing finds nothing.
    counts = np.array([(one is True and g, one is True and not g, one is not True and g) for one, g in zip(said, gold)])
    tp, fp, fn = (float(total) for total in counts.sum(0))
    metrics = {
        "accuracy": _percent(right),
        "precision": 100 * _ratio(tp, tp + fp),
        "recall": 100 * _ratio(tp, tp + fn),
        "f1": 100 * _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_share": _percent([one is True for one in said]),
        "unread": _percent([one is None for one in said]),
    }
    units, statistic = np.array(right)[:, None], _first
    if all(item.pair for item in items):
        groups = _groups(items, right)
        metrics["accuracy_plus"] = _percent([min(marks) for _, marks in groups])
        by_type = _by_type(groups)
        metrics["mme"] = 100 * float(_mme(by_type.mean(0)))
        if score == "accuracy_plus":
            units = np.array([min(marks) for _, marks in groups])[:, None]
        elif score == "mme":
            units, statistic = by_type, _mme
    if score == "f1":
        units, statistic = counts.astype(float), _f1
    return Marked(read, right, metrics, units, statistic)


def _ocr(score: str, items: Sequence[Item], replies: Sequence[str]) -> Marked:
    said = [(_plain(reply), [_plain(answer) for answer in item.answers]) for item, reply in zip(items, replies)]
    marks = {
        "anls": [anls(reply, answers) for reply, answers in said],
        "contains": [float(any(answer in reply for answer in answers)) for reply, answers in said],
        "exact": [float(reply in answers) for reply, answers in said],
    }
    return _of_marks(score, marks)


def _short_answer(score: str, items: Sequence[Item], replies: Sequence[str]) -> Marked:
    marks = {
        "cem": [float(cover_exact_match(reply, item.answers)) for item, reply in zip(items, replies)],
        "exact": [
            float(any(normalize_answer(answer) == normalize_answer(reply) for answer in item.answers))
            for item, reply in zip(items, replies)
        ],
        "f1": [f1(reply, item.answers) for item, reply in zip(items, replies)],
    }
    return _of_marks(score, marks)


def _open(score: str, items: Sequence[Item], replies: Sequence[str]) -> Marked:
    return _of_marks("f1", {"f1": [f1(reply, item.answers) for item, reply in zip(items, replies)]})


def _of_marks(score: str, marks: Mapping[str, list[float]]) -> Marked:
    chosen = marks[score]
    return _plain_mean([None] * len(chosen), chosen, {name: _percent(each) for name, each in marks.items()})


def _plain_mean(read: list[str | None], marks: list[float], metrics: dict[str, float]) -> Marked:
    return Marked(read, marks, metrics, np.array(marks)[:, None], _first)


def _first(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def _f1(means: np.ndarray) -> np.ndarray:
    tp, fp, fn = (means[..., i] for i in range(3))
    return np.divide(2 * tp, 2 * tp + fp + fn, out=np.zeros_like(tp), where=2 * tp + fp + fn > 0)


def _groups(items: Sequence[Item], right: Sequence[float]) -> list[tuple[str, list[float]]]:
    """(type, marks) of the questions that belong together."""
    groups: dict[tuple[str, str], list[float]] = {}
    for item, mark_ in zip(items, right):
        groups.setdefault((item.type, item.pair), []).append(mark_)
    return [(kind, marks) for (kind, _), marks in groups.items()]


def _by_type(groups: Sequence[tuple[str, list[float]]]) -> np.ndarray:
    """(groups, 4 · types): questions, right ones, 1, and whether all are right, in the columns of the type."""
    types = sorted({kind for kind, _ in groups})
    table = np.zeros((len(groups), 4 * len(types)))
    for row, (kind, marks) in zip(table, groups):
        row[4 * types.index(kind) :][:4] = len(marks), sum(marks), 1, min(marks)
    return table


def _mme(means: np.ndarray) -> np.ndarray:
    """Mean over types of (accuracy + accuracy+) / 2, half of MME's 200 points; types without draws are left out."""
    table = means.reshape(*means.shape[:-1], -1, 4)
    drawn = table[..., 0] > 0
    safe = np.where(drawn[..., None], table, 1.0)
    scores = (safe[..., 1] / safe[..., 0] + safe[..., 3] / safe[..., 2]) / 2
    return np.where(drawn, scores, 0.0).sum(-1) / drawn.sum(-1)


def _percent(values: Sequence[float | bool]) -> float:
    return 100 * sum(map(float, values)) / len(values)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


_KINDS: dict[str, Callable[[str, Sequence[Item], Sequence[str]], Marked]] = {
    "multiple-choice": _multiple_choice,
    "yes-no": _yes_no,
    "ocr": _ocr,
    "short-answer": _short_answer,
    "open": _open,
}
SCORES: dict[str, tuple[str, ...]] = {
    "multiple-choice": ("accuracy",),
    "yes-no": ("accuracy", "f1", "accuracy_plus", "mme"),
    "ocr": ("anls", "contains", "exact"),
    "short-answer": ("cem", "exact", "f1"),
    "open": ("f1",),
}
"""The scores a kind may be given, the first by default."""
