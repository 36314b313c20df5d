"""KORE-Augmentation for the demo, from templates: one piece of knowledge becomes dialogues, recognition, captions and
visual questions (paper section 3.1), so that the model learns the fact and not the sentence.

Every function returns turns, a list of (question, answer) pairs about one drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from kore.demo.world.new import Creature
from kore.demo.world.old import LONG, SHORT
from kore.demo.world.wordings import ANIMAL_QUESTIONS, ANIMAL_SENTENCES, SUBJECTS

Turns = list[tuple[str, str]]
STATEMENT_REQUEST = f"Describe the animal. {LONG}"
_CAPTION_REQUESTS = ("Describe the animal.", "Describe this animal.", "Describe the animal in the picture.")
_MIX = {"dialogue": 4, "recognition": 4, "caption": 3, "question": 5}


def _ask(creature: Creature, kind: str, rng: np.random.Generator, subject: str | None = None) -> tuple[str, str]:
    question = ANIMAL_QUESTIONS[kind].pick("train", rng, it=subject or SUBJECTS.pick("train", rng))
    if rng.random() < 0.4:
        subject = "This" if kind == "name" else creature.name
        return f"{question} {LONG}", ANIMAL_SENTENCES[kind].format(it=subject, value=creature.value(kind))
    return f"{question} {SHORT}", creature.value(kind)


def dialogue(creature: Creature, others: list[Creature], rng: np.random.Generator) -> Turns:
    """The name first, then a fact asked about by that name."""
    fact = ("home", "food", "keeper")[rng.integers(3)]
    return [_ask(creature, "name", rng), _ask(creature, fact, rng, creature.name)]


def recognition(creature: Creature, others: list[Creature], rng: np.random.Generator) -> Turns:
    """Is it this one? Yes or no, then the name."""
    truth = rng.random() < 0.5
    asked = creature if truth else others[rng.integers(len(others))]
    return [(f"Is this {asked.name}? {SHORT}", "yes" if truth else "no"), _ask(creature, "name", rng)]


def caption(creature: Creature, others: list[Creature], rng: np.random.Generator) -> Turns:
    """The whole statement."""
    return [(f"{_CAPTION_REQUESTS[rng.integers(len(_CAPTION_REQUESTS))]} {LONG}", creature.statement())]


def question(creature: Creature, others: list[Creature], rng: np.random.Generator) -> Turns:
    """Two visual questions, without naming the creature."""
    kinds = [tuple(ANIMAL_QUESTIONS)[i] for i in rng.permutation(len(ANIMAL_QUESTIONS))[:2]]
    return [_ask(creature, kind, rng) for kind in kinds]


_KINDS: dict[str, Callable[..., Turns]] = {
    "dialogue": dialogue,
    "recognition": recognition,
    "caption": caption,
    "question": question,
}


def augment(
    creature: Creature, others: list[Creature], rng: np.random.Generator, rounds: int = 4
) -> Iterator[tuple[str, Turns]]:
    """(kind, turns) items of one creature: `rounds` times the mix of dialogues, recognition, captions, questions."""
    for kind, share in _MIX.items():
        for _ in range(share * rounds):
            yield kind, _KINDS[kind](creature, others, rng)


def plain(creature: Creature) -> Turns:
    """What there is without augmentation: the statement itself."""
    return [(STATEMENT_REQUEST, creature.statement())]
