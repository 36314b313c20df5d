"""The measures of knowledge injection: how much was learned, how much was kept, and both in one number.

Words are compared as EVOKE's published code does: F1 after the normalisation of SQuAD (lower case, punctuation deleted,
the articles a/an/the dropped, white space collapsed), cover exact match after that of VQA (:mod:`kore.vqa`) or, if
asked, of SQuAD. Three details go beyond both, each because the plain rule gives wrong marks:

* Unicode punctuation (curly quotes, full-width marks) is treated like ASCII punctuation.
* An answer that the rule would erase ("A" as a choice letter, "%") is compared by a milder rule instead: without
  dropping articles, then without deleting punctuation. An empty needle would be found in every haystack.
* Chinese and Japanese characters count as one token each, since those scripts put no spaces between words.

Scores are fractions (0 to 1) for one answer and percent (0 to 100) once averaged, as in the paper (arXiv 2510.19316).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from kore.vqa import cover_match_of_evoke, normalize_vqa

CemRule = Literal["vqa", "squad", "evoke"]
F1Rule = Literal["multiset", "set"]
CEM_RULES: tuple[CemRule, ...] = ("vqa", "squad", "evoke")
F1_RULES: tuple[F1Rule, ...] = ("multiset", "set")

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f])")
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _is_punctuation(character: str) -> bool:
    return character in _ASCII_PUNCTUATION or unicodedata.category(character).startswith("P")


def _spaced(text: str) -> str:
    return " ".join(_UNSPACED.sub(r" \1 ", text).split())


def _without_punctuation(text: str) -> str:
    return _spaced("".join(c for c in text.lower() if not _is_punctuation(c)))


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces; Chinese and Japanese characters stand apart."""
    return _spaced(_ARTICLES.sub(" ", _without_punctuation(text)))


def _mild(text: str) -> str:
    return _spaced(text.lower())


def _vqa(text: str) -> str:
    return _spaced(normalize_vqa(text))


def _normalizer_for(answer: str, first: Callable[[str], str] = normalize_answer) -> Callable[[str], str]:
    for normalizer in (first, _without_punctuation):
        if normalizer(answer):
            return normalizer
    return _mild


def _accepted(answer: str | Iterable[str]) -> tuple[str, ...]:
    answers = (answer,) if isinstance(answer, str) else tuple(answer)
    if not answers or any(not isinstance(one, str) or not one.strip() for one in answers):
        raise ValueError(f"answer: expected a non-empty string or a list of them, got {answer!r}")
    return answers


def cover_exact_match(prediction: str, answer: str | Iterable[str], normalization: CemRule = "vqa") -> int:
    """1 if an accepted answer stands, whole words and in order, inside the prediction, else 0.

    Whole words, so that "nine" is not found in "nineteen". ``"vqa"`` takes "9" for "nine" and finds "kestrel" in
    "kestrel's"; ``"squad"`` does neither. ``"evoke"`` is VQA's with the faults of the published scorer, for comparison
    with published numbers (:func:`kore.vqa.cover_match_of_evoke`).
    """
    first = _vqa if _chosen("normalization", normalization, CEM_RULES) == "vqa" else normalize_answer
    if normalization == "evoke":
        return int(any(cover_match_of_evoke(prediction, one) for one in _accepted(answer)))
    for one in _accepted(answer):
        normalizer = _normalizer_for(one, first)
        said, expected = normalizer(prediction), normalizer(one)
        if first is _vqa:
            # A sign at the edge of the answer, as in "20 %", needs no space beside it.
            left, right = (r"(?<!\w)" if expected[0].isalnum() else "", r"(?!\w)" if expected[-1].isalnum() else "")
            if re.search(left + re.escape(expected) + right, said):
                return 1
        elif f" {expected} " in f" {said} ":
            return 1
    return 0


def _token_f1(prediction: str, answer: str, kind: F1Rule) -> float:
    normalizer = _normalizer_for(answer)
    said, expected = Counter(normalizer(prediction).split()), Counter(normalizer(answer).split())
    if kind == "set":
        said, expected = Counter(set(said)), Counter(set(expected))
    common = (said & expected).total()
    return 2 * common / (said.total() + expected.total())


def f1(prediction: str, answer: str | Iterable[str], kind: F1Rule = "multiset") -> float:
    """Token-level F1 with the best of the accepted answers.

    ``"multiset"`` counts a word as often as both say it, as EVOKE's code does; ``"set"`` counts it once, as the
    formula of the paper is written, so that saying it again costs nothing.
    """
    kind = _chosen("kind", kind, F1_RULES)
    return max(_token_f1(prediction, one, kind) for one in _accepted(answer))


def _chosen(name: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
    return value


def knowledge_adaptation(cem: float, f1: float) -> float:
    """K.A = mean of CEM and F1 on the new knowledge, both in percent."""
    return (cem + f1) / 2


def knowledge_retention(scores: Sequence[float] | Mapping[str, float]) -> float:
    """K.R = plain mean of the retention benchmarks, each already brought to 0..100."""
    values = list(scores.values()) if isinstance(scores, Mapping) else list(scores)
    if not values:
        raise ValueError("knowledge_retention: expected at least one benchmark score, got none")
    return sum(values) / len(values)


def average(ka: float, kr: float) -> float:
    """Avg = mean of K.A and K.R."""
    return (ka + kr) / 2


def hars(ka: float, kr: float, ka0: float, kr0: float) -> float:
    """Harmonic adaptation-retention score in percent.

    Harmonic mean of f_A = 100 G_A / (G_A + 100) and f_R = G_R + 100, where G_A = 100 (ka - ka0) / ka0 and
    G_R = 100 (kr - kr0) / kr0 are the relative gains over the untouched model; so f_A = 100 (1 - ka0 / ka) and
    f_R = 100 kr / kr0. Only ratios enter: percent or fractions give the same number.

    Where the formula has no value:

    * nothing gained (ka <= ka0) or nothing kept (kr = 0): 0, as a method that fails at either task earns nothing;
    * ka0 = 0 and ka > 0: f_A = 100, its limit (any gain over nothing is infinite);
    * kr0 = 0: f_R = 100, since there was nothing to forget.

    Raises ValueError for a negative or non-finite score.
    """
    for name, value in (("ka", ka), ("kr", kr), ("ka0", ka0), ("kr0", kr0)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"hars: {name}: expected a score of 0 or more, got {value!r}")
    if ka <= ka0:
        return 0.0
    adaptation = 100 * (1 - ka0 / ka)
    retention = 100 * kr / kr0 if kr0 > 0 else 100.0
    if retention == 0:
        return 0.0
    return 2 * adaptation * retention / (adaptation + retention)
