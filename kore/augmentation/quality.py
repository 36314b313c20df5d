"""What came out of an augmentation, in numbers and examples: ``quality.json`` and ``quality.html``."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from kore.artifacts import atomic_write
from kore.augmentation.chance import stream
from kore.augmentation.checks import evidence_text, same_question, supported
from kore.augmentation.export import reason_kind
from kore.augmentation.types import TASKS, ItemResult, KnowledgeItem, Sample
from kore.augmentation.words import word_count

T = TypeVar("T")
ITEMS_SHOWN, IMAGES_SHOWN = 6, 48
REMEMBERED = 50_000
BINS = 20
REASONS_KEPT, TYPES_KEPT = 500, 10_000


def write_quality(out: Path, results: Iterable[ItemResult], seed: int = 0) -> Path:
    """Measure results in one pass and write ``out/quality.json`` and ``out/quality.html``.

    Memory does not grow with their number: counts, histograms, a sample of items and images drawn with ``seed``, and
    fingerprints of a share of the questions.

    Returns:
        The path of the page.
    """
    from kore.augmentation.quality_page import write_page

    quality = Quality(seed)
    for result in results:
        quality.add(result)
    atomic_write(out / "quality.json", json.dumps(quality.numbers(), indent=1, ensure_ascii=False) + "\n")
    return write_page(out / "quality.html", quality)


class Quality:
    """Adds up what is to be known of results, one item at a time.

    Args:
        seed: Which items and images are shown.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.items: Counter[str] = Counter()
        self.types: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.rounds = Lengths()
        self.questions = {task: Lengths() for task in TASKS}
        self.answers = {task: Lengths() for task in TASKS}
        self.support = {task: Shares() for task in TASKS}
        self.similarity = {task: Shares(low=-1.0) for task in TASKS}
        self.licences: Counter[str] = Counter()
        self.failures: Counter[tuple[str, str]] = Counter()
        self.repeated = 0
        self.wordings = Repetitions(REMEMBERED)
        self.pictures = Repetitions(REMEMBERED)
        self.shown: Drawn[ItemResult] = Drawn(ITEMS_SHOWN)
        self.images: Drawn[tuple[KnowledgeItem, Sample]] = Drawn(IMAGES_SHOWN)

    def add(self, result: ItemResult) -> None:
        """Count one item."""
        item = result.item
        self.items[item.category] += 1
        _count(self.types, item.type, TYPES_KEPT)
        for sample in result.samples:
            self._add_sample(item, sample)
        for failure in result.failures:
            kind = (failure.task, reason_kind(failure.reason))
            self.failures[kind if kind in self.failures or len(self.failures) < REASONS_KEPT else _OTHER] += 1
        self._add_questions(result)
        if result.samples:
            self.shown.offer(self._rank("item", item.id), result)

    def _add_sample(self, item: KnowledgeItem, sample: Sample) -> None:
        task = sample.task
        self.samples[task] += 1
        self.turns[task] += len(sample.turns)
        if task == "dialogue":
            self.rounds.add(len(sample.turns))
        for number, (question, answer) in enumerate(sample.turns):
            self.questions[task].add(word_count(question))
            self.answers[task].add(word_count(answer))
            if task != "recognition" and not (number == 0 and len(sample.turns) > 1):
                self.support[task].add(supported(evidence_text(item), answer))
        if sample.similarity is not None:
            self.similarity[task].add(sample.similarity)
        if sample.image is not None:
            self.pictures.add(sample.image.sha256)
            _count(self.licences, sample.image.candidate.licence, TYPES_KEPT)
            self.images.offer(self._rank("image", sample.id), (item, sample))

    def _add_questions(self, result: ItemResult) -> None:
        """Questions that repeat one of the same item (about the same image), and wordings seen in another one."""
        earlier: list[tuple[str, str | None]] = []
        for sample in result.samples:
            image = None if sample.image is None else sample.image.sha256
            for whole, _ in sample.turns:
                question = whole.split("\n", 1)[0]
                if any(other_image == image and same_question(question, other) for other, other_image in earlier):
                    self.repeated += 1
                earlier.append((question, image))
        wordings = {_wording(question, result.item.title) for question, _ in earlier}
        for wording in sorted(wordings):
            self.wordings.add(wording)

    def _rank(self, *names: str) -> float:
        return stream(self.seed, "quality", *names).random()

    def numbers(self) -> dict[str, Any]:
        """All that is measured, JSON-serialisable."""
        turns = sum(self.turns.values())
        return {
            "items": dict(sorted(self.items.items())),
            "samples": {task: self.samples[task] for task in TASKS},
            "turns": {task: self.turns[task] for task in TASKS},
            "dialogue_rounds": self.rounds.numbers(),
            "question_words": {task: self.questions[task].numbers() for task in TASKS},
            "answer_words": {task: self.answers[task].numbers() for task in TASKS},
            "types": dict(self.types.most_common()),
            "answers_found_in_text": {task: self.support[task].numbers() for task in TASKS if task != "recognition"},
            "questions_repeated_within_item": self.repeated / turns if turns else 0.0,
            "wordings_repeated_across_items": self.wordings.share(),
            "different_images": self.pictures.different(),
            "similarity": {task: self.similarity[task].numbers() for task in TASKS},
            "licences": dict(self.licences.most_common()),
            "failures": [
                {"task": task, "reason": reason, "count": count}
                for (task, reason), count in sorted(self.failures.items(), key=lambda entry: (-entry[1], entry[0]))
            ],
        }


_OTHER = ("", "other reasons")


def _count(counter: Counter[str], name: str, most: int) -> None:
    counter[name if name in counter or len(counter) < most else "others"] += 1


class Lengths:
    """A histogram of small whole numbers."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self.counts[min(value, 10_000)] += 1

    def numbers(self) -> dict[str, float] | None:
        """Mean, median and the largest; None without any."""
        total = sum(self.counts.values())
        if not total:
            return None
        passed, median = 0, 0
        for value in sorted(self.counts):
            passed += self.counts[value]
            if 2 * passed >= total:
                median = value
                break
        mean = sum(value * count for value, count in self.counts.items()) / total
        return {"mean": mean, "median": median, "largest": max(self.counts)}


class Shares:
    """A histogram of numbers from ``low`` to 1, with their mean and the share of those that are 1."""

    def __init__(self, low: float = 0.0) -> None:
        self.low, self.bins = low, [0] * BINS
        self.total, self.sum, self.whole, self.least = 0, 0.0, 0, 1.0

    def add(self, value: float) -> None:
        place = int((value - self.low) / (1 - self.low) * BINS)
        self.bins[min(max(place, 0), BINS - 1)] += 1
        self.total, self.sum, self.least = self.total + 1, self.sum + value, min(self.least, value)
        self.whole += value >= 1.0

    def numbers(self) -> dict[str, Any] | None:
        """Count, mean, least, share of ones and the histogram; None without any."""
        if not self.total:
            return None
        whole = self.whole / self.total
        return {
            "count": self.total,
            "mean": self.sum / self.total,
            "least": self.least,
            "whole": whole,
            "bins": self.bins,
        }


class Repetitions:
    """The share of things that came before, estimated in bounded memory.

    Things are told apart by a hash, and only those whose hash ends in some zero bits are remembered; when there are too
    many, one more bit has to be zero. Whether a thing is remembered does not depend on how often it comes, so that the
    share among the remembered estimates that of all; up to ``most`` different things it is exact.
    """

    def __init__(self, most: int) -> None:
        self._most, self._bits = most, 0
        self._counts: dict[int, int] = {}

    def add(self, thing: str) -> None:
        fingerprint = int.from_bytes(hashlib.blake2b(thing.encode(), digest_size=8).digest(), "big")
        if fingerprint & ((1 << self._bits) - 1):
            return
        self._counts[fingerprint] = self._counts.get(fingerprint, 0) + 1
        while len(self._counts) > self._most:
            self._bits += 1
            mask = (1 << self._bits) - 1
            self._counts = {each: count for each, count in self._counts.items() if not each & mask}

    def different(self) -> int:
        """How many different things came."""
        return len(self._counts) << self._bits

    def share(self) -> float:
        """The share of all that came before."""
        total = sum(self._counts.values())
        return 1 - len(self._counts) / total if total else 0.0


class Drawn(Generic[T]):
    """The things of the smallest ranks: a random sample where ranks are random, whatever the order."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, T]] = []
        self._offers = 0

    def offer(self, rank: float, thing: T) -> None:
        self._offers += 1
        entry = (-rank, -self._offers, thing)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def __iter__(self) -> Iterator[T]:
        return (thing for _, _, thing in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1])))


def _wording(question: str, title: str) -> str:
    """A question without its instruction, names of the item, case, punctuation and numbers."""
    text = question.split("\n", 1)[0].casefold().replace(title.casefold(), "#")
    return " ".join(re.sub(r"[^\w#]+", " ", re.sub(r"\d+", "0", text)).split())


def reference() -> Mapping[str, float]:
    """KORE-74K of the paper, per item: rounds, visual questions, images."""
    return {"rounds": 75_710 / 9_422, "vqa": 46_468 / 9_422, "images": 65_312 / 9_422}
