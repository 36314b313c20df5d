"""What the cells of a world share beyond its files: the old inputs' covariances, generally augmented data, and the
answers of the untouched model."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kore.artifacts import atomic_write, read_json
from kore.reproduce.families import family
from kore.reproduce.files import Folder
from kore.reproduce.prepare import World
from kore.reproduce.studies import AUGMENTED, GENERAL, PLAIN

CAPTURE_BATCH = 64
EVALUATION_BATCH = 128
MAX_NEW_TOKENS = 24
COVARIANCE, GRADIENTS = "covariance", "gradients"
_DONE = "captured.json"


def load_start(checkpoint: Path) -> Any:
    """A fresh copy of a pre-trained model, float32 on the CPU."""
    import kore

    return kore.load_model(checkpoint, dtype="float32", device="cpu")


@lru_cache(maxsize=2)
def encoder(checkpoint: Path, sha256: str) -> Any:
    """The encoder of a pre-trained model; it keeps what it has encoded. ``sha256``: of the weights."""
    from kore.demo.encoding import CachedEncoder

    return CachedEncoder.from_pretrained(checkpoint)


def encoder_of(world: World) -> Any:
    """:func:`encoder` of a world."""
    return encoder(world.checkpoint, world.about["sha256"])


@lru_cache(maxsize=8)
def _conversations(file: Path, stamp: int) -> tuple[Any, ...]:
    from kore.data import load_conversations

    return tuple(load_conversations(file))


def conversations(file: Path) -> list[Any]:
    """The conversations of a file, read once as long as it does not change."""
    return list(_conversations(file, file.stat().st_mtime_ns))


def old_conversations(world: World) -> list[Any]:
    """Those of all dimensions."""
    return [each for file in world.old_groups.values() for each in conversations(file)]


def data_file(world: World, data: str) -> Path:
    """The file of new data of a kind."""
    if data in (AUGMENTED, PLAIN):
        return world.augmented if data == AUGMENTED else world.plain
    return world.augmented.with_name(f"{data}.json")


def captured(world: World) -> Path:
    """The folder of the covariances and output gradients of a world's old dimensions, captured where it is not there.

    C counts the tokens of prompts. G has a loss at their text tokens and at the first of the answer.
    """
    import kore
    from kore.data import prompt_batches

    folder = world.directory / "captured"
    key = {
        "checkpoint": world.about["sha256"],
        "files": {name: _count(file) for name, file in world.old_groups.items()},
    }
    done = folder / _DONE
    if done.is_file() and read_json(done) == key:
        return folder
    partial = folder.with_name("captured.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model, encode = load_start(world.checkpoint), encoder_of(world)
    for name, file in world.old_groups.items():
        prompts = prompt_batches(conversations(file), encode, CAPTURE_BATCH)
        kore.capture_covariance(model, prompts, progress=False).save(partial / COVARIANCE / name)
        kore.capture_output_gradients(model, prompts, progress=False).save(partial / GRADIENTS / name)
    atomic_write(partial / _DONE, json.dumps(key, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _count(file: Path) -> int:
    return len(conversations(file))


@lru_cache(maxsize=4)
def merged(folder: Path, kind: str, merge: str, groups: tuple[str, ...], sha256: str) -> Any:
    """Covariances or output gradients of some dimensions as one; all of them where ``groups`` is empty.

    Args:
        folder: As :func:`captured` gives it.
        kind: :data:`COVARIANCE` or :data:`GRADIENTS`.
        merge: "raw" or "balanced".
        groups: Dimensions.
        sha256: Of the model's weights.
    """
    import kore

    load = kore.load_covariance if kind == COVARIANCE else kore.load_output_gradients
    names = groups or tuple(sorted(path.name for path in (folder / kind).iterdir()))
    sets: Any = {name: load(folder / kind / name) for name in names}
    if len(names) == 1:
        return sets[names[0]]
    return kore.merge_covariance(sets, weights="balanced" if merge == "balanced" else None)


def write_general(world: World) -> None:
    """The new knowledge under every general augmentation that needs no language model: as many conversations as the
    augmented data have, each a request to describe and an answer, the first of each thing unchanged.

    The requests are the world's own, since the library's own wordings are not in the small models' vocabulary.
    """
    from kore.augmentation.general import augment_general
    from kore.augmentation.images.store import ImageStore
    from kore.augmentation.texts import load_texts
    from kore.augmentation.types import KnowledgeItem

    texts, kind, count = load_texts(), family(world.family), _count(world.augmented)
    rows = [json.loads(line) for line in world.knowledge.read_text(encoding="utf-8").splitlines()]
    each = count // len(rows)
    key = {"conversations": count, "things": [row["id"] for row in rows], "checkpoint": world.about["sha256"]}
    done = world.augmented.with_name("general.json")
    if done.is_file() and read_json(done) == key:
        return
    requests = {one.messages[0].text: one for one in conversations(world.plain)}
    asked = {row["id"]: next(text for text in requests if row["type"] in text) for row in rows}
    folder = Folder(world.augmented.parent, kind, world.world)
    for method in GENERAL:
        scratch = world.augmented.parent / f"{method}-store"
        images: Any = SimpleNamespace(store=ImageStore(scratch))
        talks = []
        for row in rows:
            item = KnowledgeItem(
                row["id"],
                row["category"],
                row["type"],
                row["title"],
                row["text"],
                world.knowledge.parent / row["image"],
            )
            made = augment_general(item, method, texts, None, images, world.world, samples=each)  # type: ignore[arg-type]
            usable = made.samples
            for number in range(each):
                sample = usable[number % len(usable)]
                question = asked[row["id"]].removeprefix("<image>\n")
                talks.append((f"{row['id']}-{number:02d}", [(question, sample.turns[0][1])], _opened(sample.image)))
        folder.conversations(f"{method}.json", talks)
        shutil.rmtree(scratch)
    atomic_write(done, json.dumps(key, indent=1))


def _opened(image: Any) -> Any:
    from kore.fetch import open_image

    return open_image(image.path)


def ask(model: Any, world: World, split: str, output: Path) -> tuple[Any, Any]:
    """The answers to the new and to the old questions of a split, kept in ``output``."""
    import kore
    from kore.data import load_questions

    found = []
    for name, file in (("new", world.new_questions[split]), ("old", world.old_questions[split])):
        questions = load_questions(file)
        found.append(
            kore.evaluate(
                model,
                encoder_of(world),
                questions,
                batch_size=EVALUATION_BATCH,
                max_new_tokens=MAX_NEW_TOKENS,
                output=output / name,
                progress=False,
            )
        )
    return found[0], found[1]


def marks(new: Any, old: Any) -> dict[str, Any]:
    """K.A, the mean of CEM and F1 over the new questions, and K.R, the mean over the dimensions of the old ones, in
    percent, with what they are made of."""
    from kore.metrics import average, knowledge_retention
    from kore.reproduce.scoring import dimension_scores, task_scores

    tasks = task_scores(old.answers)
    dimensions = dimension_scores(tasks)
    ka, kr = new.overall.mean, knowledge_retention(dimensions)
    return {
        "ka": ka,
        "kr": kr,
        "avg": average(ka, kr),
        "cem": new.overall.cem,
        "f1": new.overall.f1,
        "types": {kind: score.mean for kind, score in new.by_type.items()},
        "tasks": tasks,
        "dimensions": dimensions,
    }


def untouched(world: World, split: str, output: Path) -> dict[str, Any]:
    """Marks of the model before any training; its answers are kept in ``output``."""
    new, old = ask(load_start(world.checkpoint), world, split, output)
    return {"checkpoint": world.about["sha256"], **marks(new, old)}
