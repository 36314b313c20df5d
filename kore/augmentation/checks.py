"""Which generated answers are not accepted, and why.

The check of support is one of words: every number, with its unit, and every proper name of an answer must stand in the
text, and so must at least ``SUPPORT`` of its other content words, those aside that its question has. In scripts without
spaces a character counts where it stands in the text beside the same neighbour. In other languages than English, whose
words change their endings more, and whose nouns may have capitals, another form of a name is enough. What a clause of
the text denies may not be said, nor the other way round.

It stops what a model adds of its own. It does not find a statement that is wrong although its words are there, such as
one with the names of two persons exchanged; it takes a synonym for something new; and it does not know that an answer
in another language than the text says the same.

A reason is a sentence: the model gets it with the next attempt, and the report shows it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache

from kore.augmentation.schema import MAX_QUESTIONS, MAX_ROUNDS, Caption, Dialogue, Quadruplet, Questions, Round
from kore.augmentation.types import KnowledgeItem
from kore.augmentation.words import (
    FUNCTION_WORDS,
    NEGATIONS,
    QUESTION_WORDS,
    UNITS,
    Token,
    fold,
    ordinal,
    small_words,
    stem_match,
    tokenize,
    units,
    word_count,
)

SUPPORT = 0.6
SAME_QUESTION = 0.8
QUESTION_WORDS_AT_MOST = 40
ANSWER_WORDS_AT_MOST = 60
SUMMARY_WORDS_AT_MOST = 25
DEPICTED_WORDS_AT_MOST = 15
SHORT_ANSWER_WORDS_AT_MOST = 6
HYPERNYM_WORDS_AT_MOST = 4

_SOURCE = re.compile(
    r"\b(?P<strong>(?:according to|mentioned in|described in|stated in|provided in|given in|reported in|listed in"
    r"|said in|based on)\s+)?(?:the|this|that|your)\s+(?:\w+\s+)?"
    r"(?P<noun>text|article|passage|paragraph|excerpt|snippet)\b",
    re.IGNORECASE,
)
_SOURCE_PHRASE = re.compile(
    r"\b(?:according to|(?:mentioned|described|stated|provided|given|reported|listed|said) in|based on|does|did"
    r"|in)\s+(?:the|this)\s+(?:above\s+|given\s+|provided\s+)?"
    r"(?P<noun>report|story|document|description|context|source|information|author|data|facts|summary|content)\b"
    r"(?!\s+(?:age|technolog|cent|minist|scien))",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(
    r"\b(?:(?:is|are|was|were|does|do|did|has|have)(?:\s+not|n'?t)\s+(?:\w+\s+)?"
    r"(?:mention|specif|stat|provid|say|said|given|giv|disclos|reveal)\w*"
    r"|not\s+(?:specified|mentioned|stated|provided|available|given)"
    r"|(?:i\s+(?:do not|don'?t|cannot|can'?t)\s+(?:know|say|tell))|cannot be (?:determined|answered)|n/a)\b",
    re.IGNORECASE,
)
_BARE_NO_ANSWER = frozenset({"unknown", "none", "n/a", "na", "not known", "unclear", "-", "unspecified"})
_CLAUSE = re.compile(
    r"[.!?;:](?=\s|$)|[,،؛؟](?!\d)|[。!?,;:、\n]|\s[–—-]\s"
    r"|\b(?:and|but|while|whereas|although|because|since|und|aber|et|mais|pero|ma|mas|но|а|и)\b",
    re.IGNORECASE,
)
_NO_DENIAL = re.compile(
    r"\bno (?:other|less|fewer|longer than|more than)\b|\bnot (?:only|just|least|until)\b", re.IGNORECASE
)
_LONGEST_NAME = 12
_MARKS = re.compile(r"<image>|</?s>|<\|[^|>]{1,40}\|>|\[/?INST\]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.IGNORECASE)


class _Evidence:
    """The words of a text, for lookup. ``small`` are the small words of its language, if that is not English."""

    def __init__(self, text: str, small: frozenset[str] | None = None) -> None:
        self.small = small_words(text) if small is None else small
        self._text, self._tokens = text, tokenize(text)
        self.keys = frozenset(token.key for token in self._tokens)
        self.keys |= {number for key in self.keys if (number := ordinal(key))}

    @cached_property
    def text(self) -> str:
        """All of it, folded."""
        return fold(self._text)

    @cached_property
    def _pairs(self) -> frozenset[str]:
        return frozenset(pair for token in self._tokens for pair in token.near)

    @cached_property
    def _starts(self) -> dict[str, list[str]]:
        starts: dict[str, list[str]] = {}
        for key in self.keys:
            starts.setdefault(key[:4], []).append(key)
        return starts

    @cached_property
    def _initials(self) -> frozenset[str]:
        """The initials of all names of several words and of their parts."""
        return frozenset(
            initials[start:end]
            for name in _names(self._tokens)
            for initials in ["".join(self._tokens[place].key[0] for place in name[:_LONGEST_NAME])]
            for start in range(len(initials))
            for end in range(start + 2, len(initials) + 1)
        )

    @cached_property
    def _units(self) -> dict[str, set[str]]:
        """For each number that has units, their names."""
        found: dict[str, set[str]] = {}
        for token, unit in units(self._tokens):
            found.setdefault(token.key, set()).add(unit)
        return found

    def content(self, text: str) -> list[Token]:
        """The words and numbers of another text that say something, in order."""
        return [token for token in tokenize(text) if token.content and token.key not in self.small]

    def has(self, token: Token) -> bool:
        """Whether the token is there: a number as it is, an acronym also spelled out, another word in any form."""
        if token.near:
            return not self._pairs.isdisjoint(token.near)
        if self.has_exactly(token):
            return True
        if token.number:
            return False
        if token.key.removesuffix("s") in self.keys or f"{token.key}s" in self.keys:
            return True
        if token.key in UNITS and any(UNITS[token.key] in found for found in self._units.values()):
            return True
        return any(stem_match(token.key, other) for other in self._starts.get(token.key[:4], ()))

    def has_exactly(self, token: Token) -> bool:
        """Whether the number or name is there letter for letter; an acronym also spelled out."""
        return token.key in self.keys or (token.upper and token.key in self._initials)

    def lacks(self, text: str, question: bool = False) -> list[Token]:
        """The names and numbers of a text that are not there, and the numbers that are, with another unit.

        A capital at the start of a sentence says little. Such a word is taken for a name when the next one has a
        capital too; otherwise a form of it is enough, and in a question, whose first word asks, nothing is needed.
        """
        tokens = tokenize(text)
        result = []
        for index, token in enumerate(tokens):
            if not token.content or not (token.number or token.capital) or token.key in self.small:
                continue
            after = tokens[index + 1] if index + 1 < len(tokens) else None
            followed = after is not None and after.capital and not after.initial
            if token.number or (not self.small and (token.upper or not token.initial or (followed and not question))):
                found = self.has_exactly(token)
            else:
                found = question or token.key.endswith(("ly", "ing")) or self.has(token)
            if not found:
                result.append(token)
        for token, unit in units(tokens):
            if unit not in self._units.get(token.key, {unit}):
                result.append(dataclasses.replace(token, shown=f"{token.shown} {unit}"))
        return result


def _names(tokens: Sequence[Token]) -> Iterator[list[int]]:
    """The places of words with capitals that follow each other, small words such as "of" between them left out."""
    run: list[int] = []
    for place, token in enumerate(tokens):
        if token.capital and token.content:
            run.append(place)
        elif token.key not in FUNCTION_WORDS:
            if len(run) > 1:
                yield run
            run = []
    if len(run) > 1:
        yield run


@lru_cache(maxsize=256)
def _evidence(text: str) -> _Evidence:
    return _Evidence(text)


@lru_cache(maxsize=256)
def _clauses(text: str) -> tuple[tuple[_Evidence, bool], ...]:
    """The clauses of a text, each with whether it denies something."""
    small = _evidence(text).small
    return tuple((_Evidence(clause, small), _denies(clause)) for clause in _CLAUSE.split(text) if clause.strip())


def _denies(text: str) -> bool:
    return any(token.key in NEGATIONS for token in tokenize(_NO_DENIAL.sub(" ", text)))


def _opposite(item: KnowledgeItem, question: str, answer: str) -> str | None:
    """A clause of an answer that says what the text denies, or denies what it says.

    A clause is judged where the text has one with all of its content words, those of the title aside and two of them
    at least, and never in answer to a question that denies something itself.
    """
    if _denies(question):
        return None
    text = evidence_text(item)
    evidence, title = _evidence(text), _evidence(item.title)
    for clause in _CLAUSE.split(answer):
        words = [token for token in evidence.content(clause) if token.key not in NEGATIONS and not title.has(token)]
        if len(words) < 2:
            continue
        there = [denies for said, denies in _clauses(text) if all(said.has(word) for word in words)]
        if there and _denies(clause) not in there:
            return clause.strip()
    return None


def evidence_text(item: KnowledgeItem) -> str:
    """All that an item says: title, type, text and facts."""
    facts = [f"{name}: {value}" for name, value in item.facts.items()]
    return "\n".join([item.title, item.type, item.text, *facts])


def _content(text: str) -> list[Token]:
    """Content words and numbers, in order."""
    return [token for token in tokenize(text) if token.content]


def supported(text: str, answer: str) -> float:
    """Share of the answer's content words and numbers that stand in the text, from 0 to 1.

    Case, accents, endings and ways of writing a number make no difference. An answer without content words, such as
    "Yes", has nothing to be found and counts as 1; an empty one as 0.
    """
    if not answer.strip():
        return 0.0
    evidence = _evidence(text)
    words = evidence.content(answer)
    if not words:
        return 1.0
    return sum(evidence.has(word) for word in words) / len(words)


@lru_cache(maxsize=4096)
def _question_parts(question: str) -> tuple[tuple[str, ...], frozenset[str], frozenset[str], frozenset[str]]:
    """A question's words in order, its question words, its names and numbers, and its content words."""
    keys = tuple(token.key for token in tokenize(question))
    asks = frozenset(keys) & QUESTION_WORDS
    content = _content(question)
    fixed = frozenset(token.key for token in content if token.number or (token.capital and not token.initial))
    rest = frozenset(key for token in content for key in (token.near or (token.key,)))
    return keys, asks, fixed, rest - fixed


def same_question(first: str, second: str) -> bool:
    """Whether two questions ask the same: equal but for case and punctuation, or with the same question words, names
    and numbers and nearly the same other words, not one word in place of another."""
    keys, asks, fixed, content = _question_parts(first)
    other_keys, other_asks, other_fixed, other_content = _question_parts(second)
    if keys == other_keys:
        return True
    if asks != other_asks or fixed != other_fixed:
        return False
    only, other_only = content - other_content, other_content - content
    forms = {word for word in only if any(stem_match(word, other) for other in other_only)}
    if len(only) > len(forms) and any(not any(stem_match(other, word) for word in forms) for other in other_only):
        return False
    common = len(content & other_content) + len(forms)
    together = common + max(len(only) - len(forms), len(other_only) - len(forms))
    return common >= SAME_QUESTION * together if together else bool(fixed)


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f'"{word}"' for word in dict.fromkeys(words))


def _yes_or_no(answer: str) -> str | None:
    tokens = tokenize(answer)
    return tokens[0].key if tokens and tokens[0].key in ("yes", "no") else None


def _about_source(item: KnowledgeItem, text: str) -> str | None:
    """The words by which a question or answer points at the text it was made from, or None."""
    own = _evidence(evidence_text(item)).text
    for match in _SOURCE.finditer(text):
        if match["strong"] or fold(match["noun"]) not in own:
            return match[0]
    for match in _SOURCE_PHRASE.finditer(text):
        if fold(match["noun"]) not in own:
            return match[0]
    return None


def _missing(tokens: Iterable[Token]) -> str:
    """That tokens are not in the text, as the end of a sentence."""
    words = list(dict.fromkeys(token.shown for token in tokens))
    return f"{_quoted(words[:6])}, which {'is' if len(words) == 1 else 'are'} not in the text"


def _question_faults(item: KnowledgeItem, question: str, most: int) -> list[str]:
    faults = []
    if not _content(question):
        faults.append("the question asks nothing")
    if (count := word_count(question)) > most:
        faults.append(f"the question has {count} words, at most {most} are wanted")
    if mark := _MARKS.search(question):
        faults.append(f"the question holds the mark {mark[0]!r}")
    if source := _about_source(item, question):
        faults.append(f'the question says "{source}"; it is to be asked without pointing at where the answer stands')
    if unknown := _evidence(evidence_text(item)).lacks(question, question=True):
        faults.append(f"the question has {_missing(unknown)}")
    return faults


def _answer_faults(
    item: KnowledgeItem, question: str, answer: str, most: int, share: float, shown: str | None = None
) -> list[str]:
    """What is wrong with an answer; one that is empty or no answer is judged no further.

    ``shown`` is the question as it will be asked, where that is other than ``question``: it must not hold the answer.
    """
    bare = fold(answer).strip(" .!")
    if not bare:
        return ["the answer is empty"]
    if _no_answer(item, answer):
        return ["the answer says that it is not known; ask only what the text answers"]
    faults = []
    if (count := word_count(answer)) > most:
        faults.append(f"the answer has {count} words, at most {most} are wanted")
    if mark := _MARKS.search(answer):
        faults.append(f"the answer holds the mark {mark[0]!r}")
    if source := _about_source(item, answer):
        faults.append(f'the answer says "{source}"; it is to be told without pointing at where it stands')
    evidence = _evidence(evidence_text(item))
    if unknown := evidence.lacks(answer):
        faults.append(f"the answer has {_missing(unknown)}")
    if opposite := _opposite(item, question, answer):
        faults.append(f'the answer says "{opposite}", the opposite of the text')
    asked = _Evidence(question if shown is None else shown, evidence.small)
    told = evidence.content(answer)
    new = [word for word in told if not asked.has(word)]
    decision = _yes_or_no(answer)
    if decision and not new:
        if decision == "no" and len(told) > 1 and _denies(answer.partition(",")[2]):
            denied = [said for said, denies in _clauses(evidence_text(item)) if denies]
            if any(all(said.has(word) for word in told if word.key not in NEGATIONS) for said in denied):
                return faults
        if decision == "no":
            faults.append('the answer is only "No", which the text cannot bear out; ask for what is the case')
        elif supported(evidence_text(item), question) < share:
            faults.append('the answer is "Yes" to a question whose words are not in the text')
        return faults
    if not new:
        faults.append("the answer stands in the question already" if told else "the answer says nothing")
        return faults
    missing = [token for token in new if not evidence.has(token)]
    others = [token for token in missing if token not in unknown]
    if others and len(new) - len(missing) < share * len(new):
        faults.append(
            f"of the {len(new)} content words that the answer adds only {len(new) - len(missing)} are in the text, not "
            f"{_quoted(token.shown for token in others[:6])}; keep to the words of the text"
        )
    return faults


def _no_answer(item: KnowledgeItem, answer: str) -> bool:
    """Whether an answer says that there is none, in words that the text does not have itself."""
    own = _evidence(evidence_text(item)).text
    bare = fold(answer).strip(" .!")
    if bare in _BARE_NO_ANSWER:
        return not holds(own, bare)
    match = _NO_ANSWER.search(answer)
    return match is not None and fold(match[0]) not in own


def _sentence(place: str, faults: Sequence[str]) -> str:
    return f"{place}: {'; '.join(faults)}."


def _duplicate(question: str, others: Iterable[str], title: str) -> str | None:
    """The question that was asked already. A title in both says nothing of what is asked, however long it is."""

    def same(other: str) -> bool:
        if holds(question, title) and holds(other, title):
            return same_question(without(question, title, ""), without(other, title, ""))
        return same_question(question, other)

    return next((other for other in others if same(other)), None)


def check_dialogue(
    item: KnowledgeItem, answer: Dialogue, seen: Iterable[str] = ()
) -> tuple[Dialogue | None, list[str]]:
    """The rounds that are acceptable, in order, at most ``MAX_ROUNDS``, and why the others are not.

    Args:
        item: What the rounds are about.
        answer: All rounds.
        seen: Questions that the conversation has already.
    """
    asked = list(seen)
    rounds: list[Round] = []
    reasons: list[str] = []
    for number, entry in enumerate(answer.rounds, 1):
        faults = _question_faults(item, entry.question, QUESTION_WORDS_AT_MOST)
        faults += _answer_faults(item, entry.question, entry.answer, ANSWER_WORDS_AT_MOST, SUPPORT)
        if (other := _duplicate(entry.question, asked, item.title)) is not None:
            faults.append(f'the question was asked already: "{other}"')
        if faults:
            reasons.append(_sentence(f"Round {number}", faults))
            continue
        asked.append(entry.question)
        rounds.append(entry)
    accepted = Dialogue(rounds=tuple(rounds[:MAX_ROUNDS])) if rounds else None
    return accepted, reasons


def check_caption(item: KnowledgeItem, answer: Caption, seen: Iterable[str] = ()) -> tuple[Caption | None, list[str]]:
    """The caption where it is acceptable, or why it is not. ``seen`` holds summaries not to be repeated."""
    reasons = []
    evidence = _evidence(evidence_text(item))
    for place, text, most in (
        ("The summary", answer.summary, SUMMARY_WORDS_AT_MOST),
        ("What is depicted", answer.depicted, DEPICTED_WORDS_AT_MOST),
    ):
        faults = []
        if not _content(text):
            faults.append("it is empty")
        if (count := word_count(text)) > most:
            faults.append(f"it has {count} words, at most {most} are wanted")
        if mark := _MARKS.search(text):
            faults.append(f"it holds the mark {mark[0]!r}")
        if source := _about_source(item, text):
            faults.append(f'it says "{source}"; tell what is the case')
        if unknown := evidence.lacks(text):
            faults.append(f"it has {_missing(unknown)}")
        if faults:
            reasons.append(_sentence(place, faults))
    if _no_answer(item, answer.summary):
        reasons.append("The summary says that something is not known; tell what the text says.")
    if (share := supported(evidence_text(item), answer.summary)) < SUPPORT:
        missing = [token.shown for token in evidence.content(answer.summary) if not evidence.has(token)]
        reasons.append(
            f"The summary: only {share:.0%} of its content words are in the text, not {_quoted(missing[:6])}; "
            "keep to the words of the text."
        )
    if opposite := _opposite(item, "", answer.summary):
        reasons.append(f'The summary says "{opposite}", the opposite of the text.')
    if fold(answer.summary) in {fold(other) for other in seen}:
        reasons.append("The summary was given already.")
    return (None, reasons) if reasons else (answer, [])


def without(question: str, subject: str, hypernym: str) -> str:
    """A question with the hypernym wherever its subject stood."""
    pattern = rf"(?<!\w){re.escape(subject.strip())}(?!\w)"
    return re.sub(pattern, lambda _: hypernym, question, flags=re.IGNORECASE) if subject.strip() else question


def holds(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, in whatever case."""
    pattern = rf"(?<!\w){re.escape(phrase.strip())}(?!\w)"
    return bool(phrase.strip()) and re.search(pattern, text, re.IGNORECASE) is not None


def _quadruplet_faults(item: KnowledgeItem, entry: Quadruplet) -> list[str]:
    faults = _question_faults(item, entry.question, QUESTION_WORDS_AT_MOST)
    shown = without(entry.question, entry.subject, entry.hypernym)
    if fold(entry.answer).strip(" .") == fold(entry.subject).strip():
        shown = entry.question
    faults += _answer_faults(item, entry.question, entry.answer, SHORT_ANSWER_WORDS_AT_MOST, 1.0, shown)
    if not holds(entry.question, entry.subject):
        faults.append(f'the question does not hold the subject "{entry.subject}" word for word')
    if supported(evidence_text(item), entry.subject) < 1.0:
        faults.append(f'the subject "{entry.subject}" is not in the text')
    if not _content(entry.hypernym):
        faults.append("the hypernym is empty")
    if (count := word_count(entry.hypernym)) > HYPERNYM_WORDS_AT_MOST:
        faults.append(f"the hypernym has {count} words, at most {HYPERNYM_WORDS_AT_MOST} are wanted")
    if _MARKS.search(entry.subject + entry.hypernym):
        faults.append("subject or hypernym hold a mark of a chat format")
    if fold(entry.hypernym).strip() == fold(entry.subject).strip():
        faults.append("the hypernym is the subject itself; name what sort of thing it is")
    told = _evidence(evidence_text(item)).content(entry.answer)
    kind = _Evidence(entry.hypernym)
    if told and not _yes_or_no(entry.answer) and all(kind.has(word) for word in told):
        faults.append(f'the hypernym "{entry.hypernym}" gives the answer away')
    return faults


def check_questions(
    item: KnowledgeItem, answer: Questions, seen: Iterable[str] = ()
) -> tuple[Questions | None, list[str]]:
    """The quadruplets that are acceptable, at most ``MAX_QUESTIONS``, and why the others are not.

    ``seen`` holds questions that were asked elsewhere and are not wanted again.
    """
    asked = list(seen)
    kept: list[Quadruplet] = []
    reasons: list[str] = []
    for number, entry in enumerate(answer.questions, 1):
        faults = _quadruplet_faults(item, entry)
        if (other := _duplicate(entry.question, asked, item.title)) is not None:
            faults.append(f'the question was asked already: "{other}"')
        if faults:
            reasons.append(_sentence(f"Question {number}", faults))
            continue
        asked.append(entry.question)
        kept.append(entry)
    accepted = Questions(questions=tuple(kept[:MAX_QUESTIONS])) if kept else None
    return accepted, reasons
