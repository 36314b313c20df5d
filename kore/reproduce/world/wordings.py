"""How questions are worded, and how a world divides the wordings among training, validation and test."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from kore.demo.world.splits import Phrasings
from kore.demo.world.wordings import FOOD, HOME, KEEPER, NAME, TASK_WORDINGS

TWICE = "Answer twice."
CAPITALS = "Answer in capital letters."

CONTEST_NAME = Phrasings(
    train=(
        "What is the name of {it}?",
        "What is {it} called?",
        "Name {it}.",
        "Tell me the name of {it}.",
        "Which contest is this?",
    ),
    validation=("Which contest do you see?", "What contest is this?"),
    test=("Tell me which contest this is.", "What name does {it} have?"),
)
PLACE = Phrasings(
    train=(
        "Where was {it} held?",
        "What was the place of {it}?",
        "Name the place of {it}.",
        "Tell me where {it} was held.",
        "Which place did {it} have?",
    ),
    validation=("What place did {it} have?", "Name the place where {it} was held."),
    test=("Tell me the place of {it}.", "Which was the place of {it}?"),
)
PRIZE = Phrasings(
    train=(
        "What was the prize of {it}?",
        "Which prize did {it} have?",
        "Name the prize of {it}.",
        "What did the winner of {it} get?",
        "Tell me what the winner of {it} got.",
    ),
    validation=("What prize did {it} have?", "Name what the winner of {it} got."),
    test=("Tell me the prize of {it}.", "Which was the prize of {it}?"),
)
WINNER = Phrasings(
    train=(
        "Who won {it}?",
        "Who was the winner of {it}?",
        "Name the winner of {it}.",
        "Tell me who won {it}.",
        "What is the name of the winner of {it}?",
    ),
    validation=("What is the winner of {it} called?", "Name who won {it}."),
    test=("Tell me the winner of {it}.", "Tell me the name of the winner of {it}."),
)
PARITY = Phrasings(
    train=(
        "Is the digit even or odd?",
        "Is this digit even or odd?",
        "Is this an even or an odd digit?",
        "Is the digit in the picture even or odd?",
        "Do you see an even or an odd digit?",
    ),
    validation=("Is the digit shown even or odd?", "Is the digit that you see even or odd?"),
    test=("Is this a digit that is even or odd?", "Is the digit that is shown even or odd?"),
)
COMPARE = Phrasings(
    train=(
        "Which digit is larger?",
        "Which of the digits is larger?",
        "What is the larger digit?",
        "Name the larger digit.",
        "Which is the larger of the two digits?",
    ),
    validation=("Name the larger of the two digits.", "Which of the two digits is larger?"),
    test=("What is the larger of the digits?", "Tell me the larger digit."),
)
OTHER = Phrasings(
    train=("And the other digit?", "And the other one?", "What is the other digit?", "Name the other one."),
    validation=("Which is the other one?",),
    test=("What is the other one?", "And which is the other digit?"),
)
ITS_COLOUR = Phrasings(
    train=("And its colour?", "What colour is it?", "Name its colour.", "And which colour is it?"),
    validation=("And what colour is it?",),
    test=("Which colour is it?", "What is its colour?"),
)
ITS_PARITY = Phrasings(
    train=("And is it even or odd?", "Is it even or odd?", "Is it an even or an odd digit?", "Is that even or odd?"),
    validation=("Is that digit even or odd?",),
    test=("And is that even or odd?", "And is it an even or an odd digit?"),
)

# The facts of each kind of thing, the one that names it first. `{it}` is the thing.
FACTS: dict[str, dict[str, Phrasings]] = {
    "animal": {"name": NAME, "home": HOME, "food": FOOD, "keeper": KEEPER},
    "contest": {"title": CONTEST_NAME, "place": PLACE, "prize": PRIZE, "winner": WINNER},
}
SENTENCES = {
    "name": "This is {value}.",
    "home": "{it} lives in the {value}.",
    "food": "{it} eats {value}.",
    "keeper": "{it} is kept by {value}.",
    "title": "This is {value}.",
    "place": "{it} was held at the {value}.",
    "prize": "The prize of {it} was the {value}.",
    "winner": "{value} won {it}.",
}
POINTERS = {
    "animal": ("this animal", "the animal", "the animal in the picture"),
    "contest": ("this contest", "the contest", "the contest in the picture"),
}
# In a later round the thing is only "it", as in "What does it eat?".
PRONOUN = "it"


def sentence(fact: str, it: str, value: str) -> str:
    """The fact as a sentence that begins with a capital letter."""
    text = SENTENCES[fact].format(it=it, value=value)
    return text[0].upper() + text[1:]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\{[a-z]+\}", text.lower()))


def redrawn(phrasings: Phrasings, elsewhere: set[str], rng: np.random.Generator) -> Phrasings:
    """The same wordings divided anew, as many in each split. A word that no other question uses (``elsewhere``) stays
    known: it is in a wording for training."""
    everything = (*phrasings.train, *phrasings.validation, *phrasings.test)
    first, second = len(phrasings.train), len(phrasings.train) + len(phrasings.validation)
    for _ in range(100):
        drawn = [everything[i] for i in rng.permutation(len(everything))]
        known = set().union(elsewhere, *map(_words, drawn[:first]))
        if all(_words(text) <= known for text in drawn[first:]):
            return Phrasings(tuple(drawn[:first]), tuple(drawn[first:second]), tuple(drawn[second:]))
    return phrasings


def world_wordings(rng: np.random.Generator) -> Mapping[str, Phrasings]:
    """The wordings of one world, by task or fact."""
    given = {
        **TASK_WORDINGS,
        **FACTS["animal"],
        **FACTS["contest"],
        "parity": PARITY,
        "compare": COMPARE,
        "other": OTHER,
        "its-colour": ITS_COLOUR,
        "its-parity": ITS_PARITY,
    }
    words = {name: set().union(*map(_words, (*p.train, *p.validation, *p.test))) for name, p in given.items()}
    return {
        name: redrawn(each, set().union(*(found for other, found in words.items() if other != name)), rng)
        for name, each in given.items()
    }
