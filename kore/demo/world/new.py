"""NEW knowledge: creatures nobody has seen, each a drawn glyph with a name, a home, a food and a keeper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kore.demo.world.drawing import COLOURS, draw_glyph
from kore.demo.world.names import FOODS, HOMES, NEW_NAMES
from kore.demo.world.old import SHORT
from kore.demo.world.splits import SPLITS, Item, stream
from kore.demo.world.wordings import ANIMAL_QUESTIONS, SUBJECTS

CREATURES = 10


@dataclass(frozen=True)
class Creature:
    """One entity of the new knowledge."""

    glyph: int
    name: str
    home: str
    food: str
    keeper: str

    def value(self, kind: str) -> str:
        return getattr(self, kind)

    def statement(self) -> str:
        """The plain piece of knowledge, before any augmentation."""
        facts = f"lives in the {self.home}, eats {self.food} and is kept by {self.keeper}"
        return f"This is {self.name}. {self.name} {facts}."


def creatures(world: int, count: int = CREATURES) -> tuple[Creature, ...]:
    """The creatures of one world; different worlds share no glyph."""
    rng = np.random.default_rng((world, 41))
    names = [NEW_NAMES[i] for i in rng.permutation(len(NEW_NAMES))]
    keepers = names[count : count + 8]
    return tuple(
        Creature(
            glyph=world * 1000 + number,
            name=names[number],
            home=HOMES[rng.integers(len(HOMES))],
            food=FOODS[rng.integers(len(FOODS))],
            keeper=keepers[rng.integers(len(keepers))],
        )
        for number in range(count)
    )


def picture(creature: Creature, split: str, number: int):
    """Drawing `number` of a creature in a split; drawings of different splits are different draws."""
    rng = np.random.default_rng((creature.glyph, SPLITS.index(split), number))
    return draw_glyph(creature.glyph, tuple(COLOURS)[rng.integers(len(COLOURS))], rng)


def new_items(world: int, split: str, per_fact: int) -> list[Item]:
    """Questions about every fact of every creature, each with its own drawing and an unseen wording."""
    items = []
    for position, creature in enumerate(creatures(world)):
        number = 0
        for which, (kind, phrasings) in enumerate(ANIMAL_QUESTIONS.items()):
            for repeat in range(per_fact):
                rng = stream(world, split, 2, position, which, repeat)
                subject = SUBJECTS.pick(split, rng)
                question = phrasings.pick(split, rng, it=subject)
                image = picture(creature, split, number)
                items.append(Item(kind, image, f"{question} {SHORT}", creature.value(kind)))
                number += 1
    return items
