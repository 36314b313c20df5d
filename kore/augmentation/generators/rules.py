"""A generator without a language model: templates around an item's facts, and gaps in its sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kore.augmentation.ask import NotGenerated
from kore.augmentation.chance import stream
from kore.augmentation.checks import DEPICTED_WORDS_AT_MOST, supported, without
from kore.augmentation.schema import Caption, Dialogue, Questions
from kore.augmentation.texts import Texts, as_written, filled, item_words, load_texts
from kore.augmentation.types import KnowledgeItem, Reply, Request
from kore.augmentation.words import FUNCTION_WORDS, english, tokenize, word_count
from kore.errors import KoreError

ROUNDS, QUESTIONS = 10, 5
SUMMARY_WORDS, SENTENCE_WORDS, GAP_WORDS, VALUE_WORDS = 25, 40, 34, 5
VERSION = 2
_ABBREVIATIONS = re.compile(r"(?:mrs?|ms|dr|prof|st|[js]r|gen|col|lt|no|vs|inc|ltd|corp?|\w(?:\.\w)*)", re.IGNORECASE)
_NO_NOUN_ENDS = frozenset(["in", "at", "on", "of", "to", "for", "from", "with", "as", "near", "by"])
_NOUNS_IN_ED = frozenset(["bed", "breed", "creed", "deed", "feed", "need", "seed", "shed", "speed", "weed"])
_ERAS = frozenset(["BC", "BCE", "AD", "CE"])
_SINGULAR = frozenset(["series", "species", "address", "lens", "gas", "bias", "atlas"])


class RulesGenerator:
    """Answers by rules: offline, deterministic, and only as good as the facts it is given.

    What it makes: for each fact a question in a fixed wording for its attribute (``texts/rules.yaml``; a general one
    for attributes not listed there), answered by the sentence of the text that holds the value, or by the value alone
    where no sentence does or it was an answer before; visual questions likewise, answered by the value alone, with the
    item itself as subject. The summary is the beginning of the text. What facts do not cover, and an item without any,
    gets what its sentences carry: a question for the first one, sentences with a name or number left out, and the other
    sentences as further things to be said. Facts are taken for true, also those that the text does not say.

    What it does not do: understand the text. It paraphrases nothing, draws no conclusion, asks no why, and finds no
    further subject for visual questions. A sentence that answers may say more than was asked
    for, or begin with "it". Its wordings are English: of a text in another language it asks for facts by their bare
    names, which is poor until the texts are translated. It is for demos, tests and tables of facts; data by a language
    model are richer.

    Args:
        texts: Where the wordings come from; by default the project's own.
    """

    cached = False
    corrects = False
    """Told what is wrong it would say the same in other words, and so twice."""

    def __init__(self, texts: Texts | None = None) -> None:
        self._texts = load_texts() if texts is None else texts

    def identity(self) -> Mapping[str, Any]:
        return {"generator": "rules", "version": VERSION, "texts": self._texts.identity()}

    def generate(self, request: Request) -> Reply:
        """The answer as JSON for ``request.schema``.

        Raises:
            NotGenerated: The item has neither facts nor sentences for it.
            KoreError: The schema is none that rules can fill.
        """
        makers = {Dialogue: self._dialogue, Caption: self._caption, Questions: self._questions}
        maker = makers.get(request.schema)
        if maker is None:
            raise KoreError(
                f"the generator by rules has no rule for {request.schema.__name__}; choose a language model"
            )
        rng = stream(request.seed, request.item.title, request.task)
        return Reply(json.dumps(maker(request.item, rng), ensure_ascii=False))

    def _dialogue(self, item: KnowledgeItem, rng: Any) -> dict[str, Any]:
        subject = item.title if item.category == "entity" else self._news_subject(item)
        said = sentences(item.text)
        rounds: list[dict[str, str]] = []
        used: set[str] = set()
        if said and len(said[0].split()) <= SENTENCE_WORDS:
            opening = self._texts.line(rng, "rules", "opening", subject=as_written(subject, item.text))
            rounds.append({"question": opening, "answer": said[0]})
            used.add(said[0])
        for attribute, value in given_facts(item):
            question = self._question(item, attribute, value, as_written(subject, item.text), rng)
            if _told(value, question):
                continue
            holder = _holder(said, attribute, value)
            whole = holder is not None and holder not in used and len(holder.split()) <= SENTENCE_WORDS
            rounds.append({"question": question, "answer": str(holder) if whole else _as_sentence(value)})
            used.update([holder] if holder is not None else [])
        for sentence, gap in self._gaps(item, said):
            if sentence not in used:
                used.add(sentence)
                question = self._texts.line(rng, "rules", "cloze", sentence=self._with_gap(sentence, gap))
                rounds.append({"question": question, "answer": _as_sentence(gap)})
        further = list(self._texts.variants("rules", "further"))
        rng.shuffle(further)
        rest = (each for each in said if each not in used and 3 <= len(each.split()) <= SENTENCE_WORDS)
        for sentence, template in zip(rest, further, strict=False):
            question = filled(template, {"subject": as_written(subject, item.text)})
            if not _told(sentence, question):
                rounds.append({"question": question, "answer": sentence})
        if not rounds:
            raise NotGenerated(_nothing(item, "a dialogue"))
        return {"rounds": rounds[:ROUNDS]}

    def _caption(self, item: KnowledgeItem, rng: Any) -> dict[str, Any]:
        summary = beginning(item.text, SUMMARY_WORDS)
        if not summary:
            raise NotGenerated(_nothing(item, "a caption"))
        words = item_words(item)
        depicted = self._texts.line(rng, "rules", f"depicted_{item.category}", **words)
        if word_count(depicted) > DEPICTED_WORDS_AT_MOST:
            depicted = self._texts.line(rng, "rules", f"depicted_{item.category}_briefly", **words)
        return {"depicted": depicted, "summary": summary}

    def _questions(self, item: KnowledgeItem, rng: Any) -> dict[str, Any]:
        hypernym = item.type if item.category == "entity" else self._texts.variants("rules", "news_hypernym")
        found: list[dict[str, str]] = []
        for attribute, value in given_facts(item):
            question = self._question(item, attribute, value, item.title, rng)
            shown = without(question, item.title, hypernym)
            if len(value.split()) <= VALUE_WORDS and not _told(value, f"{shown} {hypernym}"):
                found.append({"question": question, "answer": value})
        answers = {each["answer"] for each in found}
        understood = english(item.text)
        for sentence, gap in self._gaps(item, sentences(item.text)):
            key = "cloze" if _within(item.title, sentence) else "cloze_about"
            if (
                len(found) < QUESTIONS
                and (key == "cloze_about" or _replaceable(item.title, sentence))
                and understood
                and gap not in answers
                and not any(_within(a, sentence) for a in answers)
            ):
                words = {} if key == "cloze" else {"subject": item.title}
                question = self._texts.line(rng, "rules", key, sentence=self._with_gap(sentence, gap), **words)
                if not _told(gap, f"{question} {hypernym}"):
                    found.append({"question": question, "answer": gap})
        if not found:
            raise NotGenerated(_nothing(item, "a visual question"))
        return {"questions": [{**each, "subject": item.title, "hypernym": hypernym} for each in found[:QUESTIONS]]}

    def _question(self, item: KnowledgeItem, attribute: str, value: str, subject: str, rng: Any) -> str:
        asked = " ".join(re.sub(r"[_-]+", " ", attribute).split())
        of_event = item.category == "news"
        variants = self._texts.variants("rules", "events" if of_event else "attributes").get(asked.lower())
        if variants is None and not english(item.text):
            variants = self._texts.variants("rules", "label")
        elif variants is None:
            asked = asked if any(word[1:] != word[1:].lower() for word in asked.split()) else asked.lower()
            form = attribute_form(asked, value)
            asked = asked.removesuffix(" by") if form == "by" else asked
            variants = self._texts.variants("rules", "event_generic" if of_event and form == "generic" else form)
        return filled(str(rng.choice(variants)), {"subject": subject, "attribute": asked})

    def _news_subject(self, item: KnowledgeItem) -> str:
        return str(self._texts.variants("rules", "news_subject")).format(title=item.title)

    def _gaps(self, item: KnowledgeItem, said: list[str]) -> Iterator[tuple[str, str]]:
        """Sentences with the last name or number in them that is no part of the title."""
        for sentence in said:
            if 5 <= len(sentence.split()) <= GAP_WORDS:
                named = [each for each in names(sentence) if not _within(each, item.title)]
                named = [each for each in named if not _within(item.title, each) and _only_there(each, sentence)]
                if named:
                    yield sentence, named[-1]

    def _with_gap(self, sentence: str, gap: str) -> str:
        return sentence.replace(gap, self._texts.variants("rules", "gap"))


def sentences(text: str) -> list[str]:
    """The sentences of a text, split at end marks that no known abbreviation or initial explains.

    In other languages than English a number of up to two digits is taken for a day, as in "3. Oktober".
    """
    found, start = [], 0
    no_day = english(text)
    for match in re.finditer(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]|\n\s*\n", text):
        before = re.search(r"(\S+)$", text[start : match.start()])
        word = before.group(1).lstrip("(\"'“‘") if before else ""
        short = len(word) <= 2 and not no_day if word.isdigit() else _ABBREVIATIONS.fullmatch(word)
        if match.group().startswith(".") and short:
            continue
        found.append(text[start : match.end()])
        start = match.end()
    return [" ".join(each.split()) for each in (*found, text[start:]) if each.strip()]


def names(sentence: str) -> list[str]:
    """Names (words with capitals, not the first of the sentence) and numbers, in order, up to five words each.

    Words such as "The" and "When" are none, nor does a name begin with one.
    """
    found: list[tuple[int, int]] = []
    for position, match in enumerate(re.finditer(r"\w(?:[\w'’-]*\w)?(?:[.,]\d+)*", sentence)):
        word = match.group()
        if not (word[0].isupper() and position > 0) and not any(letter.isdigit() for letter in word):
            continue
        if found and sentence[found[-1][1] : match.start()] == " ":
            found[-1] = (found[-1][0], match.end())
        elif word.lower() not in FUNCTION_WORDS and word not in _ERAS:
            found.append((match.start(), match.end()))
    texts = [re.sub(r"['’]s$", "", sentence[start:end]) for start, end in found]
    return [text for text in texts if len(text.split()) <= VALUE_WORDS]


def attribute_form(attribute: str, value: str) -> str:
    """Which wording of ``texts/rules.yaml`` fits an attribute in English that has none of its own."""
    *_, last = attribute.lower().split()
    if last == "by" and " " in attribute:
        return "by"
    if last in _NO_NOUN_ENDS:
        return "label"
    # Of "number of moons" the number is asked for.
    head = re.split(r" (?:of|in|for|from|at|on|with|to) ", attribute.lower())[0]
    if head != attribute.lower():
        last, value = head.split()[-1], ""
    if last.endswith("ed") and " " not in attribute and last not in _NOUNS_IN_ED:
        return "when" if re.search(r"\b\d{4}\b", value) else "label"
    if last.endswith("s") and not last.endswith(("ss", "us", "is", "ics")) and last not in _SINGULAR:
        return "count" if re.fullmatch(r"\d[\d.,\s]*", value) else "plural"
    return "generic"


def given_facts(item: KnowledgeItem) -> list[tuple[str, str]]:
    """The facts that have a value."""
    facts = [(attribute, " ".join(str(value).split())) for attribute, value in item.facts.items()]
    return [(attribute, value) for attribute, value in facts if value]


def beginning(text: str, words: int) -> str:
    """The first whole sentences that have at most so many words; part of the first where it alone has more."""
    said = sentences(text)
    taken: list[str] = []
    for sentence in said:
        if sum(len(each.split()) for each in (*taken, sentence)) > words:
            break
        taken.append(sentence)
    if taken or not said:
        return " ".join(taken)
    first = said[0].split()[:words]
    clause = next((i for i in range(len(first), 7, -1) if first[i - 1].endswith((",", ";", ":"))), None)
    return " ".join(first[:clause]).rstrip(",;:–-") + ("." if clause else "…")


def _only_there(part: str, sentence: str) -> bool:
    """Whether a part says something, and the rest of the sentence does not say it too."""
    said = {token.key for token in tokenize(part) if token.content}
    rest = {token.key for token in tokenize(sentence.replace(part, " "))}
    return bool(said) and sentence.count(part) == 1 and not said <= rest


def _holder(said: list[str], attribute: str, value: str) -> str | None:
    """The sentence that holds a value; of several the first with a word of the attribute, and else none of them."""
    holders = [each for each in said if _within(value, each)]
    if len(holders) <= 1:
        return holders[0] if holders else None
    asked = {token.key for token in tokenize(attribute) if token.content}
    return next((each for each in holders if asked & {token.key for token in tokenize(each)}), None)


def _replaceable(title: str, sentence: str) -> bool:
    """Whether "this film" can stand for the title wherever a sentence has it: no "fired brick", no "brick wall"."""
    words = r"\s+".join(re.escape(word) for word in title.split())
    for match in re.finditer(rf"(?<!\w)(?:(?:the|an?)\s+)?{words}(?!\w)", sentence, flags=re.IGNORECASE):
        before = re.search(r"([\w'’-]+)\s*$", sentence[: match.start()])
        after = re.match(r"\s+([\w'’-]+)", sentence[match.end() :])
        if before is not None and before[1].lower() not in FUNCTION_WORDS:
            return False
        if title.islower() and after is not None and after[1].lower() not in FUNCTION_WORDS:
            return False
    return True


def _told(value: str, question: str) -> bool:
    """Whether all words of a value stand in a question, or are the initials of its words."""
    return supported(question, value) == 1.0


def _as_sentence(value: str) -> str:
    value = value[0].upper() + value[1:] if value.split()[0].islower() else value
    return value if value.endswith((".", "!", "?")) else f"{value}."


def _within(part: str, text: str) -> bool:
    words = r"\s+".join(re.escape(word) for word in part.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, flags=re.IGNORECASE) is not None


def _nothing(item: KnowledgeItem, what: str) -> str:
    return (
        f"the generator by rules found nothing for {what} of {item.title!r}: no fact that can be asked for "
        f"({len(item.facts)} given), and no sentence with a name or number; give facts, or choose a language model"
    )
