"""Round trip: augment → train → ask. Does augmented data teach more than the articles themselves, in as many steps?

    python -m benchmarks.augmentation_round_trip WORK [--quick] [--worlds 2]

The knowledge is that of `kore demo`: newly invented creatures, each one item with a drawing, one sentence of text and
three facts. `kore.augmentation` makes conversations of it with the generator by rules, in words that the small model
knows (``augmentation_texts``), and with a folder of other drawings of the same creatures as image search. The small
model of the demo is then trained on them, and on the plain articles, with the same number of steps and the same batch
size, each at the learning rate that ``kore.demo.tune`` chose for such data on other creatures. Augmented conversations
are longer, so that a step of theirs sees more tokens. The questions have wordings and drawings that no training data
have. Cells that are finished in WORK are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write, file_sha256
from kore.demo.augmentation import STATEMENT_REQUEST
from kore.demo.methods import FULL, KORE_RANK, LORA_RANK, QUICK, Budget, Method, tuned_learning_rates
from kore.demo.world.new import Creature, creatures, picture
from kore.environment import environment

HERE = Path(__file__).parent
RESULT, TEXTS = HERE / "results" / "augmentation_round_trip.json", HERE / "augmentation_texts"
FIRST_WORLD = 1
DRAWINGS = 5
PASSES = 4
GENERAL = ("text-agnostic", "image-aware", "image-agnostic")
MARKS = ("ka", "kr", "avg")


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    Attributes:
        label: In the table.
        data: A file of :func:`training_files`.
        method: Of the demo.
        rate: The demo's method whose tuned learning rate is taken.
    """

    label: str
    data: str
    method: Method
    rate: str


_KORE, _LORA = Method("KORE", "kore"), Method("LoRA", "lora")
ROWS = {
    "kore-plain": Row("KORE, plain articles", "plain", _KORE, "kore-no-augmentation"),
    "kore-plain-fast": Row("KORE, plain articles, the rate of augmented data", "plain", _KORE, "kore"),
    "kore-plain-images": Row("KORE, plain articles with the images of the augmentation", "plain-images", _KORE, "kore"),
    "kore-text-agnostic": Row("KORE, general: text, knowledge-agnostic", "text-agnostic", _KORE, "kore"),
    "kore-image-aware": Row("KORE, general: images, semantic-preserving", "image-aware", _KORE, "kore"),
    "kore-image-agnostic": Row("KORE, general: images, knowledge-agnostic", "image-agnostic", _KORE, "kore"),
    "kore-augmented": Row("KORE, kore.augmentation", "augmented", _KORE, "kore"),
    "kore-demo": Row("KORE, the demo's own augmentation", "demo", _KORE, "kore"),
    "lora-plain": Row("LoRA, plain articles", "plain", _LORA, "lora"),
    "lora-augmented": Row("LoRA, kore.augmentation", "augmented", _LORA, "lora"),
}


def article(creature: Creature) -> str:
    """What is to be known of a creature, in one sentence."""
    return creature.statement().split(". ", 1)[1]


def write_knowledge(directory: Path, world: int) -> tuple[Path, Path]:
    """The knowledge of a world as JSONL with images, and a folder of other drawings that a search finds by name."""
    originals, others = directory / "originals", directory / "drawings"
    rows = []
    for creature in creatures(world):
        for folder, numbers in ((originals, (0,)), (others, range(1, 1 + DRAWINGS))):
            folder.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                picture(creature, "train", number).save(folder / f"{creature.name} {number}.png")
        facts = {kind: creature.value(kind) for kind in ("home", "food", "keeper")}
        row = {"id": creature.name, "category": "entity", "type": "animal", "name": creature.name,
               "text": article(creature), "image": f"originals/{creature.name} 0.png", "facts": facts}  # fmt: skip
        rows.append(json.dumps(row))
    atomic_write(directory / "knowledge.jsonl", "\n".join(rows) + "\n")
    return directory / "knowledge.jsonl", others


def training_files(
    directory: Path, world: int, passes: int = PASSES, quality: bool = True
) -> tuple[list[Path], dict[str, Any]]:
    """Augment a world's knowledge ``passes`` times with different seeds; the files, and what was made."""
    from kore.augmentation import AugmentConfig, augment

    knowledge, others = write_knowledge(directory, world)
    files: list[Path] = []
    made: dict[str, Any] = {"samples": {}, "turns": {}, "images": 0, "failures": 0}
    for seed in range(passes):
        config = AugmentConfig.model_validate(
            {
                "texts": TEXTS,
                "images": {"kind": "folder", "path": others},
                "seed": seed,
                "quality": quality and seed == 0,
            }
        )
        summary = augment(knowledge, config, directory / f"augmented-{seed}", progress=False)
        files.append(summary.data)
        for name in ("samples", "turns"):
            for task, count in getattr(summary, name).items():
                made[name][task] = made[name].get(task, 0) + count
        made["images"] = max(made["images"], summary.images)
        made["failures"] += sum(summary.failures.values())
    return files, made


def general_file(directory: Path, world: int, method: str) -> Path:
    """A world's knowledge by general augmentation, eight conversations a creature."""
    from kore.augmentation import AugmentConfig, augment

    knowledge, _ = write_knowledge(directory, world)
    config = AugmentConfig.model_validate({"texts": TEXTS, "general": method, "quality": False})
    return augment(knowledge, config, directory / method, progress=False).data


def plain_with_images(directory: Path, world: int, files: list[Path]) -> Path:
    """Each article with each image that the augmentation uses for it: what images alone add."""
    images: dict[str, set[str]] = {creature.name: set() for creature in creatures(world)}
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8")):
            images[row["id"].split("-")[0]].add(row["image"])
    rows = []
    for creature in creatures(world):
        for name in sorted(images[creature.name]):
            image = next(f"{file.parent.name}/{name}" for file in files if (file.parent / name).is_file())
            turns = [
                {"from": "human", "value": f"<image>\n{STATEMENT_REQUEST}"},
                {"from": "gpt", "value": creature.statement()},
            ]
            rows.append({"id": f"{creature.name}-{len(rows)}", "image": image, "conversations": turns})
    atomic_write(directory / "plain-images.json", json.dumps(rows, indent=1))
    return directory / "plain-images.json"


def run(directory: Path, worlds: int, budget: Budget, output: Path | None) -> dict[str, Any]:
    """All cells; returns, and where asked writes, the stored result."""
    import torch
    from rich.console import Console

    from kore.data import load_conversations
    from kore.demo.comparison import Comparison, quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    rates = tuned_learning_rates()
    comparison = Comparison(directory, budget, Console())
    comparison.prepare()
    result: dict[str, Any] = {
        "budget": budget.as_dict(),
        "ranks": {"kore": KORE_RANK, "lora": LORA_RANK},
        "passes": PASSES,
        "drawings": DRAWINGS,
        "worlds": [],
        "before": [],
        "made": [],
        "rows": {},
    }
    for seed in range(worlds):
        world = FIRST_WORLD + seed
        inputs, untouched = comparison.world(seed, world)
        folder = directory / "data" / f"knowledge-{seed}"
        files, made = training_files(folder, world)
        data = {
            "plain": inputs.plain,
            "plain-images": load_conversations(plain_with_images(folder, world, files)),
            **{method: load_conversations(general_file(folder, world, method)) for method in GENERAL},
            "augmented": load_conversations(files),
            "demo": inputs.augmented,
        }
        result["worlds"].append(world)
        result["before"].append(untouched)
        digests = [file_sha256(file) for file in files]
        result["made"].append({**made, "sha256": digests})
        for name, row in ROWS.items():
            given = replace(inputs, augmented=data[row.data])
            digest = "-".join(each[:4] for each in digests) if row.data == "augmented" else row.data
            cell = comparison.cell(f"{name}-{digest}", row.method, given, rates[row.rate], seed)
            stored = result["rows"].setdefault(
                name, {"label": row.label, "learning_rate": rates[row.rate], "conversations": [], "cells": []}
            )
            stored["conversations"].append(len(data[row.data]))
            stored["cells"].append(
                {key: cell[key] for key in (*MARKS, "cem", "f1", "new_facts", "train_seconds", "eval_seconds")}
            )
    result["table"] = [
        {"row": row["label"], **{mark: _mean(row["cells"], mark) for mark in MARKS}} for row in result["rows"].values()
    ]
    result["environment"] = environment()
    if output is not None:
        atomic_write(output, json.dumps(result, indent=1) + "\n")
    return result


def _mean(cells: list[Mapping[str, Any]], mark: str) -> dict[str, float]:
    values = [cell[mark] for cell in cells]
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="directory of the data and cells")
    parser.add_argument("--worlds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer steps and questions, nothing stored")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    result = run(given.work, given.worlds, QUICK if given.quick else FULL, None if given.quick else given.output)
    for row in result["table"]:
        marks = "  ".join(f"{mark} {row[mark]['mean']:5.1f} ± {row[mark]['spread']:.1f}" for mark in MARKS)
        print(f"{row['row']:50s} {marks}")


if __name__ == "__main__":
    main()
