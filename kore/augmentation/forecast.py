"""What an augmentation would ask for and cost: the real prompts, counted and not sent."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.augmentation.ask import NotGenerated
from kore.augmentation.config import AugmentConfig
from kore.augmentation.generators import Unasked
from kore.augmentation.items import Knowledge
from kore.augmentation.limits import Prices, estimate_tokens
from kore.augmentation.run import read_knowledge
from kore.augmentation.types import Candidate, KnowledgeItem, StoredImage, Task
from kore.augmentation.workshop import Workshop

if TYPE_CHECKING:
    from kore.augmentation.types import Generator

_SAMPLE = 500
_LONGEST_ANSWERS: dict[Task, int] = {"dialogue": 650, "caption": 90, "vqa": 300}
"""Tokens of a usual full answer: ten rounds of 65, a caption, five quadruplets of 60."""


@dataclass(frozen=True)
class Estimate:
    """What the rest of a run would take. Answers that are not accepted come on top.

    Attributes:
        items: All items.
        done: Items that are done already; the other numbers are about the rest.
        requests: Requests to the language model.
        cached: Of these, answered from the cache.
        prompt_tokens: Asked, without those of the cache.
        completion_tokens: Answered, without those of the cache.
        searches: Image searches at most.
        downloads: Images downloaded at most.
        cost: By the prices of the configuration; None where there are none.
        notes: What the numbers rest on.
    """

    items: int
    done: int
    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    searches: int
    downloads: int
    cost: float | None
    notes: tuple[str, ...] = ()


def estimate(
    knowledge: Knowledge | Path | str, config: AugmentConfig, cache: Path, generator: Generator | None = None
) -> Estimate:
    """Estimate a run without asking a service, opening the network or writing anything. A server's key is not needed.

    Of many items that are not done, 500 evenly spaced ones are counted and the rest inferred.

    Raises:
        KoreError: What :func:`kore.augmentation.augment` would raise before it begins.
    """
    with tempfile.TemporaryDirectory() as folder:
        items = knowledge if isinstance(knowledge, Knowledge) else read_knowledge(Path(knowledge), config, Path(folder))
        if generator is None and config.generator.kind == "openai":
            generator = Unasked(config.generator)
        shop = Workshop.open(config, Path(cache).absolute(), generator)
        left = [number for number, item in enumerate(items) if not shop.results.done(shop.results.key(item), item)]
        step = max(1, len(left) // _SAMPLE)
        asks = config.generator.kind != "rules" and config.general in (None, "text-aware")
        chosen = set(left[::step]) if asks else set()
        counter = _Counter(shop.asker)
        counting = dataclasses.replace(shop, asker=counter, images=_NoImages())  # type: ignore[arg-type]
        for number, item in enumerate(items):
            if number in chosen:
                counting.make(item)
    scale = len(left) / len(chosen) if chosen else 0.0
    searches = _searches(config) * len(left)
    prices = Prices(config.generator.price_input or 0.0, config.generator.price_output or 0.0)
    asked, answered = round(counter.prompt_tokens * scale) * asks, round(counter.completion_tokens * scale) * asks
    priced = config.generator.price_input is not None or not asks
    notes = ["answers that are not accepted are asked for again and come on top"] if asks else []
    if asks and len(chosen) < len(left):
        notes.append(f"inferred from {len(chosen):,} of the {len(left):,} items")
    if not asks:
        notes.append("no language model is asked")
    return Estimate(
        items=len(items),
        done=len(items) - len(left),
        requests=round(counter.requests * scale) * asks,
        cached=round(counter.cached * scale) * asks,
        prompt_tokens=asked,
        completion_tokens=answered,
        searches=searches,
        downloads=searches * config.images.results if config.images.kind not in ("none", "folder") else 0,
        cost=prices.cost(asked, answered) if priced else None,
        notes=tuple(notes),
    )


def _searches(config: AugmentConfig) -> int:
    """Image searches for an item at most."""
    if config.images.kind == "none" or config.general is not None:
        return 0
    by_title = int("recognition" in config.tasks or "caption" in config.tasks)
    return by_title + config.questions * ("vqa" in config.tasks)


@dataclass
class _Counter:
    """In place of the asker: counts what it is asked, and has no answer."""

    asker: Any
    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, task: Task, item: KnowledgeItem, messages: Any, schema: Any, check: Any, max_tokens: int) -> Any:
        known = self.asker.is_cached(task, item, messages, schema, max_tokens)
        with self._lock:
            self.requests += 1
            if known:
                self.cached += 1
            else:
                self.prompt_tokens += estimate_tokens(message["content"] for message in messages)
                self.completion_tokens += min(max_tokens, _LONGEST_ANSWERS.get(task, max_tokens))
        raise NotGenerated("only counted")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.asker, name)


class _NoImages:
    """In place of the images: always one, so that no task ends before it asks."""

    _ANY = StoredImage("", Path(), 0, 0, Candidate())

    class store:
        @staticmethod
        def keep(path: Path) -> StoredImage:
            return _NoImages._ANY

    @staticmethod
    def find(query: str, original: Path | None, keep: int | None = None) -> list[tuple[StoredImage, None]]:
        return [(_NoImages._ANY, None)] * 2
