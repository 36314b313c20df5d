"""NEW knowledge: animals nobody has seen and contests nobody has heard of, the questions about them, and
KORE-Augmentation from templates (paper section 3.1): one piece of knowledge becomes dialogues, recognition, captions
and visual questions.

Turns are lists of (question, answer) about one drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kore.demo.world.old import LONG, SHORT
from kore.demo.world.splits import Item, stream
from kore.reproduce.world.lore import Lore, Thing
from kore.reproduce.world.wordings import FACTS, POINTERS

Turns = list[tuple[str, str]]
CATEGORIES = {"animal": "entity", "contest": "news"}
TYPES = {fact: CATEGORIES[kind] for kind, facts in FACTS.items() for fact in facts}
_CAPTION_REQUESTS = ("Describe {it}.", "Tell me all about {it}.", "What do you know of {it}?")
_MIX = {"dialogue": 4, "recognition": 4, "caption": 3, "question": 5}
_LONG_SHARE = 0.4


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _pointer(thing: Thing, rng: np.random.Generator) -> str:
    return _pick(POINTERS[thing.kind], rng)


class Augmenter:
    """Makes turns about the things of one draw.

    Args:
        known: The world; only its wordings for training are used.
        things: All of the draw: a picture is asked about under the name of another, too.
    """

    def __init__(self, known: Lore, things: Sequence[Thing]) -> None:
        self.known, self.things = known, things

    def _ask(self, thing: Thing, fact: str, rng: np.random.Generator, it: str | None = None) -> tuple[str, str]:
        question = self.known.wordings[fact].pick("train", rng, it=it or _pointer(thing, rng))
        if rng.random() < _LONG_SHARE:
            return f"{question} {LONG}", thing.says(fact)
        return f"{question} {SHORT}", thing.value(fact)

    def dialogue(self, thing: Thing, rng: np.random.Generator) -> Turns:
        """The name first, then a fact asked about by that name."""
        first, *rest = thing.facts
        return [self._ask(thing, first, rng), self._ask(thing, _pick(rest, rng), rng, thing.called)]

    def recognition(self, thing: Thing, rng: np.random.Generator) -> Turns:
        """Is it this one? Yes or no, then the name."""
        truth = rng.random() < 0.5
        others = [other for other in self.things if other.kind == thing.kind and other is not thing]
        asked = thing if truth else others[rng.integers(len(others))]
        return [(f"Is this {asked.called}? {SHORT}", "yes" if truth else "no"), self._ask(thing, thing.facts[0], rng)]

    def caption(self, thing: Thing, rng: np.random.Generator) -> Turns:
        """The whole statement."""
        return [(f"{_pick(_CAPTION_REQUESTS, rng).format(it=_pointer(thing, rng))} {LONG}", thing.statement())]

    def question(self, thing: Thing, rng: np.random.Generator) -> Turns:
        """Two visual questions that do not name it."""
        return [self._ask(thing, str(fact), rng) for fact in rng.permutation(thing.facts)[:2]]

    def items(self, thing: Thing, rng: np.random.Generator, rounds: int) -> Iterator[tuple[str, Turns]]:
        """(kind, turns): ``rounds`` times four dialogues, four recognitions, three captions, five questions."""
        made: dict[str, Callable[[Thing, np.random.Generator], Turns]] = {
            "dialogue": self.dialogue,
            "recognition": self.recognition,
            "caption": self.caption,
            "question": self.question,
        }
        for kind, share in _MIX.items():
            for _ in range(share * rounds):
                yield kind, made[kind](thing, rng)


def plain(thing: Thing) -> Turns:
    """What there is without augmentation: the statement itself."""
    return [(f"{_CAPTION_REQUESTS[0].format(it=POINTERS[thing.kind][0])} {LONG}", thing.statement())]


def new_items(known: Lore, things: Sequence[Thing], split: str, per_fact: int) -> list[Item]:
    """Questions about every fact of every thing, each with its own drawing and a wording of the split."""
    items = []
    for thing in things:
        numbers = iter(range(10_000))
        for which, fact in enumerate(thing.facts):
            for repeat in range(per_fact):
                rng = stream(thing.glyph, split, 6, which, repeat)
                question = known.wordings[fact].pick(split, rng, it=_pointer(thing, rng))
                picture = thing.picture(split, next(numbers))
                items.append(Item(fact, picture, f"{question} {SHORT}", thing.value(fact)))
    return items
