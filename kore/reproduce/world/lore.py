"""What one world knows: its things (animals and contests), the names that are left for new ones, its wordings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kore.demo.vision import PRACTICE_GLYPHS
from kore.demo.world.drawing import COLOURS, draw_glyph
from kore.demo.world.names import ALL_NAMES, ANIMALS, FOODS, HOMES, NAME_STARTS
from kore.demo.world.splits import SPLITS, Phrasings
from kore.reproduce.world.wordings import FACTS, sentence, world_wordings

PLACES = ("castle", "harbour", "market", "bridge", "tower", "garden", "island", "temple")
PRIZES = ("crown", "medal", "cup", "lamp", "sword", "coat", "book", "bell")
OLD_THINGS = {"animal": 12, "contest": 8}
_NEW_GLYPHS = 200_000


@dataclass(frozen=True)
class Thing:
    """An animal or a contest: a drawn glyph and what is known of it.

    Attributes:
        kind: "animal" or "contest".
        glyph: Number of its drawing.
        values: The answer to each fact of its kind; the first is its name.
    """

    kind: str
    glyph: int
    values: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> tuple[str, ...]:
        return tuple(fact for fact, _ in self.values)

    @property
    def name(self) -> str:
        return self.values[0][1]

    @property
    def called(self) -> str:
        """How a sentence speaks of it: "the camel", "Babo", "the Babo contest"."""
        if self.kind == "contest":
            return f"the {self.name} contest"
        return self.name if self.name[0].isupper() else f"the {self.name}"

    def value(self, fact: str) -> str:
        return dict(self.values)[fact]

    def says(self, fact: str) -> str:
        """The fact in a full sentence."""
        value = self.called if fact == self.facts[0] else self.value(fact)
        return sentence(fact, self.called, value)

    def statement(self) -> str:
        """All that is known, before any augmentation."""
        return " ".join(self.says(fact) for fact in self.facts)

    def picture(self, split: str, number: int) -> Any:
        """Drawing ``number`` for a split; drawings of different splits are different draws."""
        return self.draw(np.random.default_rng((self.glyph, SPLITS.index(split), number)))

    def draw(self, rng: np.random.Generator) -> Any:
        """A drawing in any colour."""
        return draw_glyph(self.glyph, tuple(COLOURS)[rng.integers(len(COLOURS))], rng)


@dataclass(frozen=True)
class Lore:
    """A world.

    Attributes:
        world: Its number.
        things: What the model knows before.
        free_names: Names that nobody has.
        wordings: By task or fact.
    """

    world: int
    things: tuple[Thing, ...]
    free_names: tuple[str, ...]
    wordings: Mapping[str, Phrasings]

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind == kind)


def make_things(
    kind: str, names: list[str], people: list[str], glyphs: list[int], rng: np.random.Generator
) -> Iterator[Thing]:
    """Things with these names; the other values are drawn, keepers and winners out of ``people``."""
    choices: dict[str, Sequence[str]] = {
        "home": HOMES,
        "food": FOODS,
        "place": PLACES,
        "prize": PRIZES,
        "keeper": people,
        "winner": people,
    }
    first, *rest = FACTS[kind]
    for name, glyph in zip(names, glyphs):
        drawn = {fact: choices[fact][int(rng.integers(len(choices[fact])))] for fact in rest}
        yield Thing(kind, glyph, ((first, name), *drawn.items()))


@lru_cache(maxsize=8)
def lore(world: int) -> Lore:
    """The world with this number."""
    rng = np.random.default_rng((world, 61))
    glyphs = [PRACTICE_GLYPHS[i] for i in rng.permutation(len(PRACTICE_GLYPHS))]
    animals = [ANIMALS[i] for i in rng.permutation(len(ANIMALS))[: OLD_THINGS["animal"]]]
    contests = OLD_THINGS["contest"]
    while True:
        names = [ALL_NAMES[i] for i in rng.permutation(len(ALL_NAMES))]
        titles, keepers, winners = names[:contests], names[contests : contests + 10], names[contests + 10 :][:8]
        used = titles + keepers + winners
        if _syllables(used) == _syllables(names):
            break
    things = (
        *make_things("animal", animals, keepers, glyphs, rng),
        *make_things("contest", titles, winners, glyphs[len(animals) :], rng),
    )
    said = {value for thing in things for _, value in thing.values}
    return Lore(world, things, tuple(sorted(set(ALL_NAMES) - said - set(used))), world_wordings(rng))


def _syllables(names: list[str]) -> set[str]:
    """First and second syllables."""
    cut = [(start, name[len(start) :]) for name in names for start in NAME_STARTS if name.startswith(start)]
    return set(itertools.chain.from_iterable(cut))


def new_things(world: int, draw: int = 0, count: int = 6) -> tuple[Thing, ...]:
    """``count`` new animals and as many new contests of a world; no other world or draw has their glyphs."""
    known = lore(world)
    rng = np.random.default_rng((world, 62, draw))
    names = [known.free_names[i] for i in rng.permutation(len(known.free_names))]
    first = _NEW_GLYPHS + (world * 16 + draw) * 64
    people = names[2 * count :]
    return (
        *make_things("animal", names[:count], people[:5], list(range(first, first + count)), rng),
        *make_things(
            "contest", names[count : 2 * count], people[5:10], list(range(first + count, first + 2 * count)), rng
        ),
    )
