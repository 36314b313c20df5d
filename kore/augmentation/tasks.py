"""The four tasks: one piece of knowledge becomes a dialogue, a recognition, a caption and visual questions.

Which image a sample gets: the dialogue the item's original; recognition the best of the retained images of a search for
the title; the caption the second best; each visual question the best of a search for its subject and hypernym. Where
the search retains too few, recognition and caption take the original image, then the one image there is; a visual
question takes the original only if its subject is the item itself. Where that leaves none, the sample is not made and
a failure says so. A search that fails is no search without results: its samples are failures too.

The answer of recognition is always "Yes", as in the paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from kore.augmentation import checks
from kore.augmentation.ask import NotGenerated
from kore.augmentation.chance import stream
from kore.augmentation.schema import Caption, Dialogue, Questions
from kore.augmentation.texts import Texts, item_words
from kore.augmentation.types import TASKS, Failure, ItemResult, KnowledgeItem, Sample, StoredImage, Task
from kore.augmentation.words import english
from kore.errors import ConfigError, DataError, KoreError, Unavailable

if TYPE_CHECKING:
    from kore.augmentation.ask import Asker
    from kore.augmentation.images import Images

ROUNDS, QUESTIONS = 10, 5
DIALOGUE_WORDS, SUMMARY_WORDS, SHORT_WORDS = 40, 25, 5
_TOKENS: dict[Task, int] = {"dialogue": 1600, "caption": 240, "vqa": 900}
_Found = tuple[StoredImage, float | None]


def make_samples(
    item: KnowledgeItem,
    texts: Texts,
    asker: Asker,
    images: Images | None,
    seed: int,
    *,
    rounds: int = ROUNDS,
    questions: int = QUESTIONS,
    tasks: Sequence[Task] = TASKS,
) -> ItemResult:
    """All tasks of one item. Depends on the arguments only, not on other items or their order.

    Args:
        images: Store and search of images; None makes dialogues without image and no other task.
        seed: Which variants of templates and prompts are drawn, together with the item's id.
        rounds: Generated rounds of the dialogue at most, after the one from a template.
        questions: Visual questions at most.

    Returns:
        What could be made. What could not is a :class:`Failure` with its reason.

    Raises:
        KoreError: Of a sort that other items would meet too, such as a wrong key.
    """
    work = _Work(item, texts, asker, images, seed, rounds, questions)
    makers: dict[Task, Callable[[], Iterator[Sample]]] = {
        "dialogue": work.dialogue,
        "recognition": work.recognition,
        "caption": work.caption,
        "vqa": work.vqa,
    }
    samples: list[Sample] = []
    for task in tasks:
        try:
            samples.extend(makers[task]())
        except (NotGenerated, NotMade) as error:
            work.fail(task, str(error))
        except Unavailable as error:
            work.fail(task, str(error), passing=True)
    return ItemResult(item, tuple(samples), tuple(work.failures))


class NotMade(KoreError):
    """One sample cannot be made; the message says why."""


@dataclass
class _Work:
    item: KnowledgeItem
    texts: Texts
    asker: Asker
    images: Images | None
    seed: int
    rounds: int
    questions: int
    failures: list[Failure] = field(default_factory=list)

    def fail(self, task: Task, reason: str, passing: bool = False) -> None:
        self.failures.append(Failure(self.item.id, task, reason, passing))

    def dialogue(self) -> Iterator[Sample]:
        item, rng = self.item, stream(self.seed, self.item.id, "dialogue")
        image = self._original()
        key = item.category if image is not None else f"{item.category}_without_image"
        first = self.texts.round(rng, "dialogue", key, **item_words(item))
        answer = self._ask(
            "dialogue",
            self._prompt("dialogue", rng, DIALOGUE_WORDS, rounds=self.rounds, first=first[0]),
            Dialogue,
            lambda given: checks.check_dialogue(item, given, [first[0]]),
        )
        generated = [(each.question, each.answer) for each in answer.rounds[: self.rounds]]
        yield self._sample("dialogue", [first, *generated], image)

    def recognition(self) -> Iterator[Sample]:
        rng = stream(self.seed, self.item.id, "recognition")
        image, similarity = self._image(0)
        question = self.texts.line(rng, "recognition", self.item.category, **item_words(self.item))
        turn = (self.texts.instructed(rng, question, "yes_or_no"), "Yes")
        yield self._sample("recognition", [turn], image, similarity)

    def caption(self) -> Iterator[Sample]:
        item, rng = self.item, stream(self.seed, self.item.id, "caption")
        image, similarity = self._image(1)
        given = self._ask(
            "caption",
            self._prompt("caption", rng, SUMMARY_WORDS),
            Caption,
            lambda given: checks.check_caption(item, given),
        )
        question = self.texts.line(rng, "caption", item.category, **item_words(item))
        words = {"depicted": _sentence(given.depicted), "summary": _sentence(given.summary)}
        turn = (self.texts.instructed(rng, question, "paragraph"), self.texts.line(rng, "caption", "answer", **words))
        yield self._sample("caption", [turn], image, similarity)

    def vqa(self) -> Iterator[Sample]:
        item, rng = self.item, stream(self.seed, self.item.id, "vqa")
        if self.images is None:
            raise NotMade("no image: the run has no store of images")
        answer = self._ask(
            "vqa",
            self._prompt("vqa", rng, SHORT_WORDS, questions=self.questions),
            Questions,
            lambda given: checks.check_questions(item, given),
        )
        seen: set[tuple[str, str]] = set()
        for number, given in enumerate(answer.questions[: self.questions], start=1):
            drawing = stream(self.seed, item.id, "vqa", number)
            try:
                question = refer(given.question, given.subject, given.hypernym, self.texts, drawing)
                image, similarity = self._image_of(given.subject, given.hypernym)
                if (question, image.sha256) in seen:
                    raise NotMade(f"asked twice about the same image: {question!r}")
            except (NotMade, Unavailable) as error:
                self.fail("vqa", f"{error} (question {number})", passing=isinstance(error, Unavailable))
                continue
            seen.add((question, image.sha256))
            turn = (self.texts.instructed(drawing, question, "short"), given.answer)
            yield self._sample("vqa", [turn], image, similarity, number)

    def _prompt(self, name: str, rng: Any, words: int, **more: Any) -> Any:
        item = self.item
        return self.texts.messages(
            name, rng, title=item.title, type=item.type, category=item.category, text=item.text, words=words, **more
        )

    def _ask(self, task: Task, messages: Any, schema: type[BaseModel], check: Callable[[Any], Any]) -> Any:
        return self.asker.ask(task, self.item, messages, schema, check, _TOKENS[task])

    def _original(self) -> StoredImage | None:
        if self.item.image is None or self.images is None:
            return None
        try:
            return self.images.store.keep(self.item.image)
        except DataError as error:
            raise NotMade(f"the original image: {error}") from None

    def _find(self, query: str, original: Path | None, keep: int | None = None) -> list[_Found]:
        if self.images is None:
            raise NotMade("no image: the run has no store of images")
        try:
            return list(self.images.find(query, original, keep))
        except (ConfigError, Unavailable):
            raise
        except KoreError as error:
            raise NotMade(f"the image search failed: {error} (searched for {query!r})") from None

    def _image(self, rank: int) -> _Found:
        """The retained image of this rank for the title, or what stands in for it; see the module."""
        found = self._find(self.item.title, self.item.image)
        if rank < len(found):
            return found[rank]
        original = self._original()
        if original is not None:
            return original, None
        if found:
            return found[0]
        raise NotMade(f"no image: the search for {self.item.title!r} retained none and the item has none")

    def _image_of(self, subject: str, hypernym: str) -> _Found:
        itself = _plain(subject) == _plain(self.item.title)
        query = f"{subject} {_plain(hypernym)}"
        found = self._find(query, self.item.image if itself else None, 1)
        if found:
            return found[0]
        original = self._original() if itself else None
        if original is None:
            raise NotMade(f"no image: the search for {query!r} retained none, and the original does not show it")
        return original, None

    def _sample(
        self,
        task: Task,
        turns: Sequence[tuple[str, str]],
        image: StoredImage | None,
        similarity: float | None = None,
        number: int | None = None,
    ) -> Sample:
        name = f"{self.item.id}-{task}" + ("" if number is None else f"-{number}")
        return Sample(name, self.item.id, task, tuple(turns), image, similarity)


def refer(question: str, subject: str, hypernym: str, texts: Texts, rng: Any) -> str:
    """The question with a reference to the image wherever its subject stood.

    An article before the subject goes with it, and before a possessive the reference is one that can have it. The
    hypernym is in lower case where only its first letter is a capital and the question is in English.

    Raises:
        NotMade: The subject does not stand in the question.
    """
    articles = "|".join(map(re.escape, texts.variants("vqa", "articles")))
    article = rf"(?:{articles})(?:(?<=['’])|\s+)"
    noun = re.sub(rf"^{article}", "", hypernym.strip(), flags=re.IGNORECASE)
    if noun[1:] == noun[1:].lower() and english(question):
        noun = noun.lower()
    drawn = {key: rng.choice(texts.variants("vqa", key)).format(hypernym=noun) for key in ("references", "possessive")}
    bare = re.sub(rf"^{article}", "", subject.strip(), flags=re.IGNORECASE)
    name = r"\s+".join(re.escape(word) for word in bare.split())
    if not name:
        raise NotMade(f"the subject is empty: in {question!r}")

    def replace(match: re.Match[str]) -> str:
        owns = re.match(r"['’](?:s\b|(?!\w))", question[match.end() :]) is not None
        chosen = drawn["possessive" if owns else "references"]
        begins = re.search(r"(?:^|[.?!:]\s+)[\"'“‘]?$", question[: match.start()]) is not None
        return chosen[0].upper() + chosen[1:] if begins else chosen

    replaced, count = re.subn(rf"(?<!\w)(?:{article})?{name}(?!\w)", replace, question, flags=re.IGNORECASE)
    if count == 0:
        raise NotMade(f"the subject does not stand in its question: {subject!r} in {question!r}")
    return replaced


def _plain(name: str) -> str:
    return " ".join(re.sub(r"^(?:the|an?)\s+", "", name.strip(), flags=re.IGNORECASE).casefold().split())


def _sentence(text: str) -> str:
    text = text.strip()
    return text if re.search(r"[.!?…][\"'”’)]*$", text) else f"{text}."
