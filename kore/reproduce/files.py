"""Writes a world as ordinary files: LLaVA conversation JSON, question JSONL, knowledge JSONL and PNG pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kore.artifacts import atomic_write
from kore.demo.world.splits import Item, stream
from kore.reproduce.families import Family
from kore.reproduce.world.lore import Lore, Thing
from kore.reproduce.world.new import CATEGORIES, Augmenter, new_items, plain
from kore.reproduce.world.old import DIMENSIONS, old_item, old_items

Turns = Sequence[tuple[str, str]]


class Folder:
    """Files below a directory; the pictures of a file are in a folder beside it.

    Args:
        kind: Gives pictures one of its sizes, chosen by a stream of ``seed``.
    """

    def __init__(self, directory: Path, kind: Family, seed: int) -> None:
        self.directory, self.kind = directory, kind
        self._rng = np.random.default_rng((seed, 65))
        directory.mkdir(parents=True, exist_ok=True)

    def picture(self, image: Any, file: str, name: str) -> str:
        """Save a picture of ``file``; its path as the file names it."""
        folder = self.directory / f"{Path(file).stem}-images"
        folder.mkdir(parents=True, exist_ok=True)
        self.kind.resized(image, self._rng).save(folder / f"{name}.png")
        return f"{folder.name}/{name}.png"

    def conversations(self, file: str, rows: Iterable[tuple[str, Turns, Any]]) -> Path:
        """LLaVA JSON of (name, turns, picture or None, or a path that was saved before)."""
        records = []
        for name, turns, image in rows:
            path = self.picture(image, file, name) if image is not None and not isinstance(image, str) else image
            said = []
            for number, (question, answer) in enumerate(turns):
                mark = "<image>\n" if number == 0 and path else ""
                said += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
            records.append({"id": name, **({"image": path} if path else {}), "conversations": said})
        return self.text(file, json.dumps(records, indent=1))

    def questions(self, file: str, items: Iterable[Item]) -> Path:
        """Question JSONL: question_id, image, text, answer, type and, where there is one, history."""
        lines = []
        for number, item in enumerate(items):
            name = f"{item.task}-{number:04d}"
            row: dict[str, Any] = {"question_id": name, "text": item.question, "answer": item.answer, "type": item.task}
            if item.image is not None:
                row["image"] = self.picture(item.image, file, name)
            if item.history:
                row["history"] = [list(one) for one in item.history]
            lines.append(json.dumps(row))
        return self.text(file, "\n".join(lines) + "\n")

    def text(self, file: str, text: str) -> Path:
        atomic_write(self.directory / file, text)
        return self.directory / file


def write_old_questions(folder: Folder, known: Lore, split: str, per_task: int) -> Path:
    """Questions of every old task."""
    return folder.questions(f"questions-{split}.jsonl", old_items(known, split, per_task))


def write_old_groups(folder: Folder, known: Lore, per_group: int) -> dict[str, Path]:
    """Old training conversations, one LLaVA JSON for each dimension: what a covariance is captured on."""
    files = {}
    for position, (name, tasks) in enumerate(DIMENSIONS.items()):
        rows = []
        for number in range(per_group):
            rng = stream(known.world, "train", 5, position, number)
            item = old_item(known, tasks[number % len(tasks)], "train", rng)
            rows.append((f"{name}-{number:03d}", (*item.history, (item.question, item.answer)), item.image))
        files[name] = folder.conversations(f"{name}.json", rows)
    return files


def write_new_knowledge(folder: Folder, known: Lore, things: Sequence[Thing], rounds: int) -> dict[str, Path]:
    """The new knowledge of a draw: "augmented" and "plain", LLaVA JSON with as many conversations each, and
    "knowledge", what `kore augment` reads (id, category, type, title, text, image, facts)."""
    augmenter, augmented, statements, knowledge = Augmenter(known, things), [], [], []
    for thing in things:
        rng = np.random.default_rng((thing.glyph, 66))
        for number, (kind, turns) in enumerate(augmenter.items(thing, rng, rounds)):
            augmented.append((f"{thing.name}-{kind}-{number:02d}", turns, thing.picture("train", number)))
        image = folder.picture(thing.picture("train", 0), "knowledge.jsonl", thing.name)
        statements.append((thing.name, plain(thing), image))
        row = {
            "id": thing.name,
            "category": CATEGORIES[thing.kind],
            "type": thing.kind,
            "title": thing.name if thing.kind == "animal" else thing.called,
            "text": thing.statement(),
            "image": image,
            "facts": {fact: thing.value(fact) for fact in thing.facts[1:]},
        }
        knowledge.append(json.dumps(row))
    repeats = len(augmented) // len(statements)
    return {
        "augmented": folder.conversations("augmented.json", augmented),
        "plain": folder.conversations(
            "plain.json", [(f"{name}-{n}", turns, image) for n in range(repeats) for name, turns, image in statements]
        ),
        "knowledge": folder.text("knowledge.jsonl", "\n".join(knowledge) + "\n"),
    }


def write_new_questions(folder: Folder, known: Lore, things: Sequence[Thing], split: str, per_fact: int) -> Path:
    """Questions about new knowledge in the EVOKE format; the type is the fact that is asked for."""
    return folder.questions(f"questions-{split}.jsonl", new_items(known, things, split, per_fact))
