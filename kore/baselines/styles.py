"""Answer styles of SEFE's data, by rules: the same knowledge asked for in another way.

The last round of a conversation is asked anew; what comes before it stays. Everything that an answer says is in the
conversation, or in another one on the same images; wrong options are answers of conversations on other images.

=================  =====================================================================================
yes/no             the question, and whether this is the answer: half of them the right one
multiple choice    the question with up to four options (of a long answer: words for a gap in it)
short              the right option, or of a long answer words that complete a sentence of it
sentence           "The answer to … is …", or the first sentence of a long answer
detailed           that, with what the earlier rounds and conversations on the same images say
=================  =====================================================================================

What is put around the texts is English.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kore.data.types import IMAGE_MARK, Conversation, Message

STYLES = ("yes/no", "multiple choice", "short", "sentence", "detailed")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\)?\s+(\S.*?)\s*$", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Z])[.)]?\.?")
_FORMAT = re.compile(
    r"\s*(answer the question using a single word or phrase|answer with the option.?s letter from the given choices "
    r"directly|(please )?answer (with )?yes or no)\.?\s*$",
    re.IGNORECASE,
)
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'“])|(?<=[。！？])")
_WORD = re.compile(r"\w[\w'’.,/-]*\w|\w")
_LONGEST, _FACTS, _OPTIONS, _TRIES = 30, 5, 4, 200


@dataclass(frozen=True)
class Diversified:
    """Conversations of which some are in another style.

    Attributes:
        conversations: All of them, in their order.
        changed: How many were turned into each style.
        was: How many of each style there were before, of all.
    """

    conversations: list[Conversation]
    changed: Mapping[str, int]
    was: Mapping[str, int]

    def __str__(self) -> str:
        now = ", ".join(f"{self.changed.get(style, 0)} {style}" for style in STYLES)
        was = ", ".join(f"{count} {style}" for style, count in self.was.items())
        return f"{sum(self.changed.values())} of {len(self.conversations)} changed, into {now} (before: {was})"


def diversify(conversations: Sequence[Conversation], share: float, seed: int) -> Diversified:
    """Turn round(share · n) of the conversations into styles they do not have, as many into each as is possible.

    Conversations that no rule can turn (those without an answer at the end) are left as they are; where there are too
    few others, fewer are turned. The same seed gives the same result.
    """
    asked = [_last_round(conversation) for conversation in conversations]
    material = _Material(conversations, asked)
    generator = random.Random(seed)
    order = generator.sample(range(len(conversations)), len(conversations))
    wanted = round(share * len(conversations))
    chosen: list[tuple[int, list[str]]] = []
    for number in order:
        if len(chosen) == wanted:
            break
        styles = material.possible(number)
        if styles:
            chosen.append((number, styles))
    result, changed = list(conversations), Counter[str]()
    for number, styles in sorted(chosen, key=lambda one: len(one[1])):
        least = min(changed[style] for style in styles)
        style = generator.choice([style for style in styles if changed[style] == least])
        question, answer = material.written(number, style, changed[style], random.Random(f"{seed} {number}"))
        changed[style] += 1
        before = conversations[number].messages[:-2]
        messages = (*before, Message("user", question), Message("assistant", answer))
        result[number] = replace(conversations[number], messages=messages)
    was = Counter(one.style for one in asked if one is not None)
    return Diversified(
        result,
        {style: changed[style] for style in STYLES if changed[style]},
        {style: was[style] for style in STYLES if was[style]},
    )


@dataclass(frozen=True)
class Asked:
    """A question with its answer, free of how the answer is to look.

    Attributes:
        question: With its image marks, without options.
        answer: The text; of a multiple choice, that of the right option.
        style: What it was.
        wrong: The other options of a multiple choice.
    """

    question: str
    answer: str
    style: str
    wrong: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The question as text alone."""
        return " ".join(self.question.replace(IMAGE_MARK, " ").split())

    @property
    def long(self) -> bool:
        return self.style in ("sentence", "detailed")

    @property
    def statement(self) -> str:
        """The answer as a sentence, or as those it has."""
        if self.long:
            return self.answer
        answer = self.answer.rstrip(".")
        answer = answer.lower() if self.style == "yes/no" else answer
        question = f" to “{self.plain}”" if 0 < len(self.plain.split()) <= 2 * _LONGEST else ""
        return f"The answer{question} is {answer}."


def parse(question: str, answer: str) -> Asked:
    """Recognise the style of an answer."""
    question, answer = _FORMAT.sub("", question).rstrip(), answer.strip()
    if answer.rstrip(".!").lower() in ("yes", "no"):
        return Asked(question, answer.rstrip(".!").capitalize(), "yes/no")
    letter = _LETTER.fullmatch(answer)
    options = list(_OPTION.finditer(question))
    right = [option[2] for option in options if letter and option[1] == letter[1]]
    if len(options) > 1 and len(right) == 1:
        wrong = tuple(option[2] for option in options if option[2] != right[0])
        return Asked(question[: options[0].start()].rstrip(), right[0], "multiple choice", wrong)
    words, ended = len(answer.split()), answer.endswith((".", "!", "?", "。"))
    if words <= 3 or (words <= 8 and not ended):
        return Asked(question, answer, "short")
    style = "sentence" if len(sentences(answer)) == 1 and words <= _LONGEST else "detailed"
    return Asked(question, answer, style)


def sentences(text: str) -> list[str]:
    """A text's sentences."""
    return [part.strip() for part in _END.split(text) if part.strip()]


def gap(text: str) -> tuple[str, str] | None:
    """A sentence of ``text`` with a gap, and what belongs there; None where there is nothing to take out.

    The first name or number that does not begin a sentence, else the last word of the first sentence.
    """
    found = sentences(text)
    for sentence in found:
        words = list(_WORD.finditer(sentence))
        named = [word for word in words[1:] if word[0][0].isupper() or word[0][0].isdigit()]
        if len(words) > 2 and named:
            start, end = named[0].span()
            for word in words:  # a name of several words is one
                if word.start() == end + 1 and sentence[end] == " " and word[0][0].isupper():
                    end = word.end()
            return f"{sentence[:start]}___{sentence[end:]}", sentence[start:end]
    words = list(_WORD.finditer(found[0])) if found else []
    if len(words) < 3:
        return None
    start, end = words[-1].span()
    return f"{found[0][:start]}___{found[0][end:]}", words[-1][0]


def _last_round(conversation: Conversation) -> Asked | None:
    rounds = conversation.messages[-2:]
    if [message.role for message in rounds] != ["user", "assistant"] or not rounds[1].text.strip():
        return None
    return parse(rounds[0].text, rounds[1].text)


def _fold(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


@dataclass
class _Material:
    """What a conversation can be written anew from: its own texts, those on the same images, and others' answers."""

    conversations: Sequence[Conversation]
    asked: Sequence[Asked | None]
    _same: dict[tuple[object, ...], list[int]] = field(default_factory=dict)
    _to_question: dict[str, list[int]] = field(default_factory=dict)
    _of_style: dict[bool, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, one in enumerate(self.asked):
            images = self.conversations[number].images
            self._same.setdefault(images or (number,), []).append(number)
            if one is not None and one.style != "yes/no":
                self._to_question.setdefault(_fold(one.plain), []).append(number)
                self._of_style.setdefault(one.long, []).append(number)

    def possible(self, number: int) -> list[str]:
        """The styles that this conversation does not have and can be turned into."""
        one = self.asked[number]
        if one is None:
            return []
        can = {
            "yes/no": one.style != "yes/no" and bool(self.rivals(number, 1, random.Random(number))),
            "multiple choice": self._choice(number, random.Random(number)) is not None,
            "short": one.style == "multiple choice" or (one.long and gap(one.answer) is not None),
            "sentence": bool(one.plain),
            "detailed": bool(self.facts(number)),
        }
        return [style for style in STYLES if can[style] and style != one.style]

    def written(self, number: int, style: str, count: int, generator: random.Random) -> tuple[str, str]:
        """Question and answer in another style. Of yes/no, those with an even ``count`` are asked for the right one."""
        one = self.asked[number]
        assert one is not None
        if style == "yes/no":
            shown = _short(one.answer) if count % 2 == 0 else self.rivals(number, 1, generator)[0]
            asks = f"Is this the right answer: “{shown}”? Answer yes or no."
            return f"{one.question}\n{asks}", "No" if count % 2 else "Yes"
        if style == "multiple choice":
            choice = self._choice(number, generator)
            assert choice is not None
            question, right, wrong = choice
            options = [right, *wrong]
            if one.style != "yes/no":
                generator.shuffle(options)
            lines = [f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options)]
            asks = "Answer with the letter of the right option."
            return "\n".join([question, *lines, asks]), chr(ord("A") + options.index(right))
        if style == "short" and not one.long:
            return f"{one.question}\nAnswer with a word or a phrase.", one.answer
        if style == "short":
            found = gap(one.answer)
            assert found is not None
            return f"{one.question}\nFill the gap with a word or a name: “{found[0]}”", found[1]
        if style == "sentence":
            told = sentences(one.answer)[0] if one.long else one.statement
            return f"{one.question}\nAnswer in one sentence.", told
        told = " ".join([one.statement, *self.facts(number)])
        return f"{one.question}\nAnswer in detail.", told

    def facts(self, number: int) -> list[str]:
        """What else is said: in the earlier rounds, and at the end of other conversations on the same images."""
        messages = self.conversations[number].messages[:-2]
        told = [
            parse(asks.text, says.text)
            for asks, says in itertools.pairwise(messages)
            if asks.role == "user" and says.role == "assistant" and says.text.strip()
        ]
        told += [one for other in self._of_images(number) if other != number and (one := self.asked[other]) is not None]
        here = self.asked[number]
        assert here is not None
        found = dict.fromkeys(one.statement for one in told if one.statement != here.statement)
        return list(found)[:_FACTS]

    def _of_images(self, number: int) -> list[int]:
        return self._same[self.conversations[number].images or (number,)]

    def _choice(self, number: int, generator: random.Random) -> tuple[str, str, list[str]] | None:
        """Question, right option and wrong ones."""
        one = self.asked[number]
        assert one is not None
        if one.style == "yes/no":
            return one.question, one.answer, ["No" if one.answer == "Yes" else "Yes"]
        if not one.long:
            wrong = self.rivals(number, _OPTIONS - 1, generator)
            return (one.question, one.answer, wrong) if wrong else None
        found = gap(one.answer)
        if found is None:
            return None
        wrong = self.rivals(number, _OPTIONS - 1, generator, gaps=True)
        return (f"{one.question}\nWhat belongs in the gap: “{found[0]}”", found[1], wrong) if wrong else None

    def rivals(self, number: int, count: int, generator: random.Random, gaps: bool = False) -> list[str]:
        """Up to ``count`` wrong answers: other options of its own, else what others answer, best to this question.

        None is on the same images, equal to the right one, or part of it. With ``gaps``, of others' gaps.
        """
        one = self.asked[number]
        assert one is not None
        if one.wrong and not gaps:
            return generator.sample(one.wrong, min(count, len(one.wrong)))
        own, right = set(self._of_images(number)), _short(one.answer)
        if gaps:
            found = gap(one.answer)
            right = found[1] if found else right
        rivals: dict[str, str] = {}
        for pool in (self._to_question.get(_fold(one.plain), []), self._of_style.get(one.long, [])):
            for other in generator.sample(pool, min(len(pool), _TRIES)):
                candidate = self.asked[other]
                assert candidate is not None
                text = _short(candidate.answer)
                if gaps:
                    found = gap(candidate.answer)
                    text = found[1] if found else ""
                folded, good = _fold(text), _fold(right)
                apart = f" {folded} " not in f" {good} " and f" {good} " not in f" {folded} "
                if folded and apart and other not in own:
                    rivals.setdefault(folded, text)
                if len(rivals) == count:
                    return list(rivals.values())
        return list(rivals.values())


def _short(answer: str) -> str:
    """An answer, or the first sentence of a long one."""
    return answer if len(answer.split()) <= _LONGEST else sentences(answer)[0]
