"""Writes the demo's world as ordinary files: LLaVA conversation JSON, question JSONL and PNG pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kore.artifacts import atomic_write
from kore.demo.augmentation import Turns, augment, plain
from kore.demo.world.new import creatures, new_items, picture
from kore.demo.world.old import GROUPS, old_item
from kore.demo.world.splits import Item, stream

PER_GROUP = 64


@dataclass(frozen=True)
class NewKnowledge:
    """Files of one set of creatures."""

    augmented: Path
    plain: Path
    questions: Path


def _save_image(image: Any, file: Path, name: str) -> str:
    folder = file.parent / f"{file.stem}-images"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png")
    return f"{folder.name}/{name}.png"


def _record(name: str, turns: Turns, image: str | None) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if number == 0 and image else ""
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversations}


def _write(file: Path, text: str) -> Path:
    atomic_write(file, text)
    return file


def write_questions(items: Iterable[Item], file: Path) -> Path:
    """Question JSONL (question_id, image, text, answer, type) with the pictures in a folder beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(items):
        name = f"{item.task}-{number:04d}"
        row = {"question_id": name, "text": item.question, "answer": item.answer, "type": item.task}
        if item.image is not None:
            row["image"] = _save_image(item.image, file, name)
        lines.append(json.dumps(row))
    return _write(file, "\n".join(lines) + "\n")


def write_old_samples(directory: Path, per_group: int = PER_GROUP) -> dict[str, Path]:
    """Old training conversations for the covariance: one LLaVA JSON for each group of tasks."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for position, (group, tasks) in enumerate(GROUPS.items()):
        file, records = directory / f"{group}.json", []
        for number in range(per_group):
            item = old_item(tasks[number % len(tasks)], "train", stream(0, "train", 3, position, number))
            image = None if item.image is None else _save_image(item.image, file, f"{group}-{number:03d}")
            records.append(_record(f"{group}-{number:03d}", [(item.question, item.answer)], image))
        files[group] = _write(file, json.dumps(records, indent=1))
    return files


def write_new_knowledge(directory: Path, world: int, split: str, per_fact: int) -> NewKnowledge:
    """New knowledge of one world, augmented and plain, and questions about it in the wording of `split`."""
    directory.mkdir(parents=True, exist_ok=True)
    everyone = creatures(world)
    augmented, statements = directory / "augmented.json", directory / "plain.json"
    records, plain_records = [], []
    for creature in everyone:
        others = [other for other in everyone if other is not creature]
        rng = np.random.default_rng((world, 51, creature.glyph))
        for number, (kind, turns) in enumerate(augment(creature, others, rng)):
            name = f"{creature.name}-{kind}-{number:02d}"
            records.append(_record(name, turns, _save_image(picture(creature, "train", number), augmented, name)))
        image = _save_image(picture(creature, "train", 0), statements, creature.name)
        plain_records.append(_record(creature.name, plain(creature), image))
    # Without augmentation the same few statements are seen again and again, as often as the augmented items.
    repeats = len(records) // len(plain_records)
    return NewKnowledge(
        augmented=_write(augmented, json.dumps(records, indent=1)),
        plain=_write(statements, json.dumps(plain_records * repeats, indent=1)),
        questions=write_questions(new_items(world, split, per_fact), directory / f"questions-{split}.jsonl"),
    )


def write_run_config(directory: Path, checkpoint: Path, training: dict[str, Any], rank: int | str) -> Path:
    """`kore-run.yaml`: the KORE cell of the first seed as a configuration for `kore run`."""
    import yaml

    data = directory.absolute() / "data"
    config = {
        "output_dir": str(directory.absolute() / "kore-run"),
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "old": {"files": [str(data / "old" / f"{group}.json") for group in GROUPS]},
        "adapter": {"method": "kore", "rank": rank},
        "new": {"files": [str(data / "new-0" / "augmented.json")]},
        "train": training,
        "eval": {
            "new": [str(data / "new-0" / "questions-test.jsonl")],
            "old": [{"file": str(data / "old" / "questions-test.jsonl"), "name": "old"}],
            "batch_size": 128,
        },
    }
    return _write(directory / "kore-run.yaml", yaml.safe_dump(config, sort_keys=False))
