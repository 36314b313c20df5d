"""Everything a cell of the miniature needs of one world, as files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kore.artifacts import atomic_write, read_json
from kore.demo.world.splits import SPLITS
from kore.reproduce.families import family
from kore.reproduce.files import Folder, write_new_knowledge, write_new_questions, write_old_groups, write_old_questions
from kore.reproduce.pretrain import FULL, QUICK, Log, Schedule, pretrain
from kore.reproduce.world.lore import lore, new_things
from kore.reproduce.world.old import DIMENSIONS

TEST_WORLDS = (0, 1, 2)
VALIDATION_WORLDS = (100,)
_DATA = "data.json"


@dataclass(frozen=True)
class Sizes:
    """How much is written.

    Attributes:
        things: New animals, and as many new contests.
        rounds: Of the augmentation; one is 16 conversations a thing.
        per_fact: Questions about each new fact.
        per_task: Questions of each old task.
        per_group: Old conversations of each dimension.
    """

    things: int = 6
    rounds: int = 3
    per_fact: int = 3
    per_task: int = 20
    per_group: int = 64


SIZES = Sizes()
QUICK_SIZES = Sizes(things=4, rounds=2, per_fact=2, per_task=10, per_group=32)


@dataclass(frozen=True)
class World:
    """Where the files of a world are.

    Attributes:
        family: Name of the family.
        world: Its number.
        draw: Of the new knowledge.
        directory: Of all that follows.
        checkpoint: The pre-trained model.
        about: What :func:`kore.reproduce.pretrain.pretrain` tells of it.
        augmented: New knowledge, augmented: LLaVA JSON.
        plain: As many conversations of the bare statements.
        knowledge: The statements for `kore augment`: JSONL.
        new_questions: Question JSONL by split; a row's type is the fact (``world.new.TYPES`` says news or entity).
        old_questions: Question JSONL by split; a row's type is the task, for ``scoring``.
        old_groups: Old training conversations by dimension, in the order of ``world.old.DIMENSIONS``: LLaVA JSON.
    """

    family: str
    world: int
    draw: int
    directory: Path
    checkpoint: Path
    about: dict
    augmented: Path
    plain: Path
    knowledge: Path
    new_questions: dict[str, Path]
    old_questions: dict[str, Path]
    old_groups: dict[str, Path]


def prepare_world(
    name: str,
    world: int,
    directory: Path,
    quick: bool = False,
    *,
    draw: int = 0,
    schedule: Schedule | None = None,
    sizes: Sizes | None = None,
    log: Log = print,
) -> World:
    """Pre-train the model of a world and write its data; what is there of the same kind is not made again.

    Below ``directory``: ``towers/<family>``, shared by the worlds of a family (prepare one world of a family before
    the others start in processes of their own), and ``<family>/world-<number>/{model,old,new-<draw>}``.

    Args:
        name: Of the family: "llava" or "qwen2.5-vl".
        world: Its number.
        directory: Where everything goes.
        quick: A short schedule and little data.
        draw: Which new knowledge; every draw has other things.
        schedule: Of the pre-training, in place of the one that ``quick`` chooses.
        sizes: Of the data, likewise.
        log: Is told a line now and then.
    """
    kind, known = family(name), lore(world)
    schedule = schedule or (QUICK if quick else FULL)
    sizes = sizes or (QUICK_SIZES if quick else SIZES)
    home = directory / name / f"world-{world}"
    about = pretrain(name, world, home / "model", directory / "towers", schedule, log)
    old, new = home / "old", home / f"new-{draw}"
    key = {"family": name, "world": world, "draw": draw, **asdict(sizes)}
    written = new / _DATA
    if not written.is_file() or read_json(written)["key"] != key:
        written.unlink(missing_ok=True)
        old_folder, new_folder = Folder(old, kind, world), Folder(new, kind, world)
        things = new_things(world, draw, sizes.things)
        write_old_groups(old_folder, known, sizes.per_group)
        write_new_knowledge(new_folder, known, things, sizes.rounds)
        for split in SPLITS[1:]:
            write_old_questions(old_folder, known, split, sizes.per_task)
            write_new_questions(new_folder, known, things, split, sizes.per_fact)
        atomic_write(written, json.dumps({"key": key}, indent=1))
    return World(
        family=name,
        world=world,
        draw=draw,
        directory=home,
        checkpoint=home / "model",
        about=about,
        augmented=new / "augmented.json",
        plain=new / "plain.json",
        knowledge=new / "knowledge.jsonl",
        new_questions={split: new / f"questions-{split}.jsonl" for split in SPLITS[1:]},
        old_questions={split: old / f"questions-{split}.jsonl" for split in SPLITS[1:]},
        old_groups={group: old / f"{group}.json" for group in DIMENSIONS},
    )
