"""OLD knowledge: fourteen tasks in the seven dimensions of the paper's retention suite.

Most tasks about digits and shapes are those of `kore demo`; here come facts about the things of a world, questions half
of which are about what is not in the picture (presence), answers in a wanted form (form) and a question that needs the
round before it (rounds). Nothing is asked with yes or no for an answer: whether what is asked about is the same as what
is seen is a relation that small models do not learn in the time there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from kore.demo.world.drawing import SHAPES
from kore.demo.world.names import NUMBERS
from kore.demo.world.old import LONG, LONG_SHARE, SCENES, SHORT, Scene, scene_item
from kore.demo.world.splits import Item, stream
from kore.reproduce.world.lore import Lore, Thing
from kore.reproduce.world.wordings import CAPITALS, FACTS, POINTERS, PRONOUN, TWICE

FORMS = {"word": SHORT, "sentence": LONG, "twice": TWICE, "capitals": CAPITALS}
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "comprehensive": ("colour", "shape", "count", "describe"),
    "ocr": ("digit", "position"),
    "multi-discipline": ("facts", "thing"),
    "instruction": ("form",),
    "multi-turn": ("rounds",),
    "math": ("parity", "compare", "sum"),
    "hallucination": ("presence",),
}
TASKS = tuple(task for tasks in DIMENSIONS.values() for task in tasks)
_FORM_TASKS = {"single": ("digit", "colour"), "shape": ("shape",)}
NONE = "none"
_READ = {"single": ("digit", "colour"), "pair": ("position",), "shape": ("shape",), "thing": ("thing",)}
_SHARES = {"single": 0.2, "pair": 0.4, "corners": 0.05, "shape": 0.06, "thing": 0.19, "facts": 0.1}
_WEIGHTS = {"sum": 2.5, "compare": 1.5, "describe": 1.5, "position": 1.2}
"""How often a task is asked about a picture that can be asked it, against 1; adding takes the longest to learn."""


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and noun != 'one' else 'a'} {noun}"


class Sight:
    """A picture and all that can be asked about it; questions are drawn anew each time.

    Args:
        kind: One of the demo's scenes, or "thing".
    """

    def __init__(self, kind: str, known: Lore, split: str, rng: np.random.Generator) -> None:
        self.kind, self.known, self.split, self.rng = kind, known, split, rng
        self.scene = Scene(split, rng)
        self.thing: Thing | None = None
        self.picture: Image.Image | None = None
        if kind == "thing":
            self.thing = known.things[rng.integers(len(known.things))]
            self.picture = self.thing.draw(rng)
        self.tasks = (*(SCENES[kind] if kind != "thing" else ("thing",)), *_EXTRA[kind])

    def ask(self, task: str, form: str | None = None) -> Item:
        """A question of a task about this picture. ``form``: of :data:`FORMS`, for the task "form"."""
        own = {
            "parity": self._parity,
            "compare": self._compare,
            "presence": self._presence,
            "rounds": self._rounds,
            "thing": self._thing,
        }
        if task in own:
            return own[task]()
        if task == "form":
            return self._form(form or _pick(("twice", "capitals"), self.rng))
        return self._seen(task)

    def _seen(self, task: str) -> Item:
        """A question of the demo about this picture, which is drawn once."""
        item = scene_item(task, self.scene, self.kind, self.known.wordings)
        if self.kind == "shape":
            if self.picture is None:
                self.picture, self._shape = item.image, item
            item = Item(task, self.picture, item.question, self._answer(item))
        return item

    def _answer(self, item: Item) -> str:
        """Of the shape that was drawn first: the demo draws another with each question."""
        shape = next(shape for shape in SHAPES if shape in self._shape.answer)
        return f"This is {_a(shape)}." if item.question.endswith(LONG) else shape

    def _pick_wording(self, name: str, **words: str) -> str:
        return self.known.wordings[name].pick(self.split, self.rng, **words)

    def _short(self, task: str) -> tuple[str, str, Image.Image | None]:
        """Question without its instruction, one-word answer, picture."""
        while True:
            item = self._seen(task)
            if item.question.endswith(SHORT):
                return item.question.removesuffix(f" {SHORT}"), item.answer, item.image

    def _form(self, form: str) -> Item:
        task = _pick(_FORM_TASKS[self.kind], self.rng)
        question, answer, image = self._short(task)
        if form == "sentence":
            answer = f"This is {_a(answer)}." if task == "shape" else f"The digit is {answer}."
        answer = {"twice": f"{answer} {answer}", "capitals": answer.upper()}.get(form, answer)
        return Item(f"form-{form}", image, f"{question} {FORMS[form]}", answer)

    def _thing(self) -> Item:
        thing = self._own_thing()
        fact = _pick(thing.facts, self.rng)
        question = self._pick_wording(fact, it=_pick(POINTERS[thing.kind], self.rng))
        return _fact("thing", self.picture, question, thing, fact, self.rng)

    def _own_thing(self) -> Thing:
        assert self.thing is not None
        return self.thing

    def _parity(self) -> Item:
        (value,), _, image = self.scene.digits("single", 1)
        question = self._pick_wording("parity")
        return _said("parity", image, question, _parity(value), f"The digit is {_parity(value)}.", self.rng)

    def _compare(self) -> Item:
        values, _, image = self.scene.digits("pair", 2)
        larger, question = NUMBERS[max(values)], self._pick_wording("compare")
        return _said("compare", image, question, larger, f"The larger digit is {larger}.", self.rng)

    def _presence(self) -> Item:
        """Half of the time a question about something of another sort than what is shown: there is none."""
        rng = self.rng
        if rng.random() < 0.5:
            return replace(self.ask(_pick(_READ[self.kind], rng)), task="presence")
        here = self._own_thing().kind if self.kind == "thing" else "shape" if self.kind == "shape" else "digit"
        absent = _pick([each for each in ("digit", "shape", *FACTS) if each != here], rng)
        if absent in FACTS:
            fact = _pick(tuple(FACTS[absent]), rng)
            question = self._pick_wording(fact, it=_pick(POINTERS[absent], rng))
        else:
            question = self._pick_wording("shape" if absent == "shape" else _pick(_READ["single"], rng))
        image = self.picture or self.ask(_READ[self.kind][0]).image
        return _said("presence", image, question, NONE, f"There is no {absent}.", rng)

    def _rounds(self) -> Item:
        """A question that cannot be answered without the round before it, or that speaks of its subject as "it"."""
        rng = self.rng
        if self.kind == "thing":
            thing = self._own_thing()
            first, *rest = thing.facts
            fact = _pick(rest, rng)
            before = self._pick_wording(first, it=_pick(POINTERS[thing.kind], rng))
            asked, image = self._pick_wording(fact, it=PRONOUN), self.picture
            history, answer = (before, thing.name), thing.value(fact)
        elif self.kind == "single":
            (value,), (colour,), image = self.scene.digits("single", 1)
            history = (self._pick_wording("digit"), NUMBERS[value])
            if rng.random() < 0.5:
                asked, answer = self._pick_wording("its-colour"), colour
            else:
                asked, answer = self._pick_wording("its-parity"), _parity(value)
        else:
            values, _, image = self.scene.digits("pair", 2)
            which = int(rng.integers(2))
            history = (self._pick_wording("position", side=("left", "right")[which]), NUMBERS[values[which]])
            asked, answer = self._pick_wording("other"), NUMBERS[values[1 - which]]
        return Item("rounds", image, f"{asked} {SHORT}", answer, ((f"{history[0]} {SHORT}", history[1]),))


_EXTRA = {
    "single": ("presence", "form", "rounds"),
    "pair": ("presence", "rounds"),
    "corners": (),
    "shape": ("presence", "form"),
    "thing": ("presence", "rounds"),
}


def _parity(value: int) -> str:
    return ("even", "odd")[value % 2]


def _pick(options, rng: np.random.Generator):
    return options[rng.integers(len(options))]


def _said(task: str, image: Image.Image | None, question: str, short: str, sentence: str, rng) -> Item:
    """An item whose answer is a word or a sentence."""
    if rng.random() < LONG_SHARE:
        return Item(task, image, f"{question} {LONG}", sentence)
    return Item(task, image, f"{question} {SHORT}", short)


def _fact(task: str, image: Image.Image | None, question: str, thing: Thing, fact: str, rng) -> Item:
    return _said(task, image, question, thing.value(fact), thing.says(fact), rng)


def fact_item(known: Lore, split: str, rng: np.random.Generator) -> Item:
    """A text-only question about a thing, which it names."""
    thing = _pick(known.things, rng)
    fact = _pick(thing.facts[1:], rng)
    question = known.wordings[fact].pick(split, rng, it=thing.called)
    return _fact("facts", None, question, thing, fact, rng)


def conversations(known: Lore, rng: np.random.Generator, pictures: int, rounds: int) -> Iterator[list[list[Item]]]:
    """For each of ``pictures`` training pictures (or text-only talks) ``rounds`` conversations about it.

    One or two questions each: in longer conversations the model learns to copy earlier answers before it looks.
    """
    kinds = list(_SHARES)
    for kind in rng.choice(kinds, size=pictures, p=list(_SHARES.values())):
        if kind == "facts":
            yield [[fact_item(known, "train", rng) for _ in range(3)] for _ in range(rounds)]
            continue
        sight = Sight(str(kind), known, "train", rng)
        talks = []
        for _ in range(rounds):
            count = min(int(rng.integers(1, 3)), len(sight.tasks))
            first = ["thing"] if kind == "thing" else []
            weights = np.array([_WEIGHTS.get(task, 1.0) for task in sight.tasks])
            rest = rng.choice(sight.tasks, count - len(first), replace=False, p=weights / weights.sum())
            tasks = [*first, *rest]
            talks.append([sight.ask(str(task)) for task in tasks])
        yield talks


def old_item(known: Lore, task: str, split: str, rng: np.random.Generator) -> Item:
    """One question of an old task about a picture of its own."""
    if task == "facts":
        return fact_item(known, split, rng)
    kinds = [kind for kind in _EXTRA if task in (*SCENES.get(kind, {"thing": None}), *_EXTRA[kind])]
    sight = Sight(_pick(kinds, rng), known, split, rng)
    return sight.ask(task, _pick(tuple(FORMS), rng) if task == "form" else None)


def old_items(known: Lore, split: str, per_task: int) -> list[Item]:
    """``per_task`` questions of every old task."""
    return [
        old_item(known, task, split, stream(known.world, split, 4, position, number))
        for position, task in enumerate(TASKS)
        for number in range(per_task)
    ]
