"""OLD knowledge: eleven tasks the shipped model knows, ten over pictures and one of text-only facts.

Every question ends with an instruction that fixes the form of the answer: one word, or a full sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from kore.demo.world.drawing import COLOURS, SHAPES, digit_indices, draw_digits, draw_glyph, draw_shape
from kore.demo.world.names import ANIMALS, FOODS, HOMES, KEEPERS, NUMBERS
from kore.demo.world.splits import Item, Phrasings, stream
from kore.demo.world.wordings import ANIMAL_QUESTIONS, ANIMAL_SENTENCES, FACTS, SUBJECTS, TASK_WORDINGS

SHORT = "Answer in one word."
LONG = "Answer in a full sentence."
LONG_SHARE = 0.3
ANIMAL_HOMES = tuple(HOMES[i] for i in np.random.default_rng(21).integers(len(HOMES), size=len(ANIMALS)))
ANIMAL_FOODS = tuple(FOODS[i] for i in np.random.default_rng(22).integers(len(FOODS), size=len(ANIMALS)))

ANIMAL_GLYPHS = range(100_000, 100_000 + len(ANIMALS))
TASKS = (*TASK_WORDINGS, "animal", "facts")
GROUPS = {
    "reading": ("digit", "colour", "shape", "animal"),
    "reasoning": ("parity", "compare", "position", "sum", "count"),
    "description": ("describe",),
    "facts": ("facts",),
}


class Scene:
    """One picture and the random choices behind it; several questions can be asked about the same picture."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.split, self.rng = split, rng
        self._drawn: tuple | None = None

    def one_of(self, options):
        return options[self.rng.integers(len(options))]

    def colours(self, count: int) -> list[str]:
        return [tuple(COLOURS)[i] for i in self.rng.permutation(len(COLOURS))[:count]]

    def digits(self, layout: str, count: int) -> tuple[list[int], list[str], Image.Image]:
        """Values, colours and the picture of `count` different digits; drawn once."""
        if self._drawn is None:
            values = [int(v) for v in self.rng.permutation(10)[:count]]
            indices = [self.one_of(digit_indices(self.split)[v]) for v in values]
            colours = self.colours(count)
            self._drawn = values, colours, draw_digits(indices, colours, layout, self.rng)
        return self._drawn


Answer = tuple[Image.Image, dict[str, str], str | None, str]  # picture, words of the question, short, sentence


def _digit(scene: Scene) -> Answer:
    (value,), _, image = scene.digits("single", 1)
    return image, {}, NUMBERS[value], f"The digit is {NUMBERS[value]}."


def _colour(scene: Scene) -> Answer:
    _, (colour,), image = scene.digits("single", 1)
    return image, {}, colour, f"The digit is {colour}."


def _parity(scene: Scene) -> Answer:
    (value,), _, image = scene.digits("single", 1)
    asked, truth = scene.one_of(("even", "odd")), ("even", "odd")[value % 2]
    return image, {"parity": asked}, "yes" if asked == truth else "no", f"The digit is {truth}."


def _compare(scene: Scene) -> Answer:
    values, _, image = scene.digits("pair", 2)
    side = "left" if values[0] > values[1] else "right"
    return image, {}, side, f"The {side} digit is larger."


def _position(scene: Scene) -> Answer:
    values, _, image = scene.digits("pair", 2)
    which = int(scene.rng.integers(2))
    side, number = ("left", "right")[which], NUMBERS[values[which]]
    return image, {"side": side}, number, f"The digit on the {side} is {number}."


def _sum(scene: Scene) -> Answer:
    values, _, image = scene.digits("pair", 2)
    return image, {}, NUMBERS[sum(values)], f"The sum is {NUMBERS[sum(values)]}."


def _count(scene: Scene) -> Answer:
    values, _, image = scene.digits("corners", int(scene.rng.integers(1, 5)))
    number = NUMBERS[len(values)]
    sentence = "There is one digit." if len(values) == 1 else f"There are {number} digits."
    return image, {}, number, sentence


def _describe_single(scene: Scene) -> Answer:
    (value,), (colour,), image = scene.digits("single", 1)
    return image, {}, None, f"A {colour} {NUMBERS[value]}."


def _describe_pair(scene: Scene) -> Answer:
    values, colours, image = scene.digits("pair", 2)
    left, right = (f"{colour} {NUMBERS[value]}" for colour, value in zip(colours, values))
    return image, {}, None, f"A {left} on the left and a {right} on the right."


def _shape(scene: Scene) -> Answer:
    shape = scene.one_of(SHAPES)
    (colour,) = scene.colours(1)
    return draw_shape(shape, colour, scene.rng), {}, shape, f"This is a {shape}."


# Questions that can be asked about the same picture.
SCENES: dict[str, dict[str, Callable[[Scene], Answer]]] = {
    "single": {"digit": _digit, "colour": _colour, "parity": _parity, "describe": _describe_single},
    "pair": {"compare": _compare, "position": _position, "sum": _sum, "describe": _describe_pair},
    "corners": {"count": _count},
    "shape": {"shape": _shape},
}


def fact_about(animal: int, kind: str) -> str:
    """What is known of an animal: its name, home, food or keeper."""
    return {"name": ANIMALS, "home": ANIMAL_HOMES, "food": ANIMAL_FOODS, "keeper": KEEPERS}[kind][animal]


def fact_item(split: str, rng: np.random.Generator) -> Item:
    """A text-only question about an animal."""
    animal = int(rng.integers(len(ANIMALS)))
    kind = tuple(FACTS)[rng.integers(len(FACTS))]
    value, subject = fact_about(animal, kind), f"the {ANIMALS[animal]}"
    asked = subject if rng.random() < 0.7 else f"the animal called {ANIMALS[animal]}"
    question = FACTS[kind].pick(split, rng, it=asked)
    if rng.random() < LONG_SHARE:
        answer = ANIMAL_SENTENCES[kind].format(it=subject.capitalize(), value=value)
        return Item("facts", None, f"{question} {LONG}", answer)
    return Item("facts", None, f"{question} {SHORT}", value)


def animal_items(split: str, rng: np.random.Generator, count: int = 1) -> list[Item]:
    """Questions about one picture of an animal: its name, or a fact about the animal it shows."""
    animal = int(rng.integers(len(ANIMALS)))
    image = draw_glyph(ANIMAL_GLYPHS[animal], tuple(COLOURS)[rng.integers(len(COLOURS))], rng)
    items = []
    for number in rng.permutation(4)[:count]:
        kind = tuple(ANIMAL_QUESTIONS)[number]
        value = fact_about(animal, kind)
        question = ANIMAL_QUESTIONS[kind].pick(split, rng, it=SUBJECTS.pick(split, rng))
        if rng.random() < LONG_SHARE:
            words = {"it": f"The {ANIMALS[animal]}", "value": f"the {value}" if kind == "name" else value}
            items.append(Item("animal", image, f"{question} {LONG}", ANIMAL_SENTENCES[kind].format(**words)))
        else:
            items.append(Item("animal", image, f"{question} {SHORT}", value))
    return items


def scene_item(task: str, scene: Scene, kind: str, wordings: Mapping[str, Phrasings] = TASK_WORDINGS) -> Item:
    """A question of a task about a scene of a kind of SCENES."""
    image, words, short, sentence = SCENES[kind][task](scene)
    question = wordings[task].pick(scene.split, scene.rng, **words)
    if short is None or scene.rng.random() < LONG_SHARE:
        return Item(task, image, f"{question} {LONG}", sentence)
    return Item(task, image, f"{question} {SHORT}", short)


def old_item(task: str, split: str, rng: np.random.Generator) -> Item:
    """One question of an old task about a picture of its own."""
    if task == "facts":
        return fact_item(split, rng)
    if task == "animal":
        return animal_items(split, rng)[0]
    kinds = [kind for kind, tasks in SCENES.items() if task in tasks]
    return scene_item(task, Scene(split, rng), kinds[rng.integers(len(kinds))])


def old_items(split: str, per_task: int, seed: int = 0) -> list[Item]:
    """`per_task` questions of every old task."""
    return [
        old_item(task, split, stream(seed, split, 1, position, number))
        for position, task in enumerate(TASKS)
        for number in range(per_task)
    ]
