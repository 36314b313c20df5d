"""The demo's world, its shipped checkpoint, and one cell of the comparison through the library's own path."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from kore.demo.checkpoint import CHECKPOINT, checked_checkpoint, old_accuracy
from kore.demo.files import write_new_knowledge, write_old_samples
from kore.demo.methods import METHODS, Budget, tuned_learning_rates
from kore.demo.tune import VALIDATION_WORLDS, climb
from kore.demo.world import drawing
from kore.demo.world.names import ALL_NAMES, KEEPERS
from kore.demo.world.new import creatures, new_items, picture
from kore.demo.world.old import TASKS, old_items
from kore.demo.world.splits import SPLITS
from kore.demo.world.wordings import SUBJECTS, wordings
from kore.errors import ArtifactError


def _pairs():
    return itertools.combinations(SPLITS, 2)


def test_digit_pictures_of_the_splits_are_disjoint():
    used = {split: set(itertools.chain(*drawing.digit_indices(split))) for split in SPLITS}
    assert all(not used[a] & used[b] for a, b in _pairs())
    assert sum(map(len, used.values())) == 1797
    assert all(len(pool) > 10 for split in SPLITS for pool in drawing.digit_indices(split))


def test_wordings_of_the_splits_are_disjoint():
    for phrasings in [*wordings().values(), SUBJECTS]:
        for a, b in _pairs():
            assert not set(getattr(phrasings, a)) & set(getattr(phrasings, b))


def test_questions_and_pictures_of_the_splits_are_disjoint(tmp_path):
    trained = write_new_knowledge(tmp_path, 1, "test", 1).augmented
    records = json.loads(trained.read_text())
    asked = {turn["value"].replace("<image>\n", "") for record in records for turn in record["conversations"][::2]}
    seen = {(tmp_path / record["image"]).read_bytes() for record in records}
    assert len(seen) == len(records)
    for split in ("validation", "test"):
        questions = new_items(1, split, 2)
        assert not asked & {item.question for item in questions}
        target = tmp_path / f"{split}.png"
        for item in questions:
            item.image.save(target)
            assert target.read_bytes() not in seen
    old = {split: {item.question for item in old_items(split, 20)} for split in SPLITS}
    assert all(not old[a] & old[b] for a, b in _pairs())


def test_validation_creatures_are_not_those_of_the_comparison():
    compared = {c.glyph for world in range(1, 10) for c in creatures(world)}
    assert not compared & {c.glyph for world in VALIDATION_WORLDS for c in creatures(world)}
    strokes = [repr(drawing.glyph(c.glyph)) for world in (1, 2, *VALIDATION_WORLDS) for c in creatures(world)]
    assert len(set(strokes)) == len(strokes)


def test_the_world_is_seeded():
    first, second = (old_items("test", 2) for _ in range(2))
    assert [item.question for item in first] == [item.question for item in second]
    creature = creatures(3)[0]
    assert np.array_equal(picture(creature, "test", 0), picture(creature, "test", 0))
    assert not np.array_equal(picture(creature, "test", 0), picture(creature, "train", 0))


def test_new_names_are_new_but_made_of_known_tokens():
    from transformers import AutoTokenizer

    from kore.demo.pretrain import conversation, encode

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert not {c.name for c in creatures(1)} & set(KEEPERS)
    rng = np.random.default_rng(0)
    known = set(itertools.chain(*(encode(conversation(rng), tokenizer, 1)[0] for _ in range(3000))))
    texts = [f" {name}" for name in ALL_NAMES]
    for split in ("validation", "test"):
        texts += [f"USER: {item.question} ASSISTANT: {item.answer}" for item in new_items(1, split, 1)]
    assert set(itertools.chain(*tokenizer(texts, add_special_tokens=False).input_ids)) <= known


def test_pretraining_encodes_as_the_library_does(tmp_path):
    from kore.data import Encoder, load_conversations
    from kore.demo.pretrain import encode, pixels
    from kore.demo.world.splits import Item

    encoder = Encoder.from_pretrained(CHECKPOINT)
    file = write_new_knowledge(tmp_path, 1, "test", 1).augmented
    example = encoder.encode(load_conversations(file)[0])
    record = json.loads(file.read_text())[0]
    from PIL import Image

    image = Image.open(tmp_path / record["image"])
    texts = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
    items = [Item("", image if i == 0 else None, q, a) for i, (q, a) in enumerate(zip(texts[::2], texts[1::2]))]
    assert len(items) > 1
    ids, labels = encode(items, encoder.tokenizer, 16)
    assert example["input_ids"].tolist() == ids
    assert example["labels"].tolist() == labels
    assert np.allclose(example["pixel_values"], pixels([image]), atol=1e-6)


def test_checkpoint_is_the_one_of_the_recipe(tmp_path):
    _, recipe = checked_checkpoint()
    assert recipe["old_task_mean"]["test"] >= 0.94
    assert set(recipe["old_task_accuracy"]["test"]) == set(TASKS)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match="sha256"):
        checked_checkpoint(tmp_path)


def test_checkpoint_does_the_old_tasks_as_the_recipe_says():
    _, recipe = checked_checkpoint()
    accuracy = old_accuracy(CHECKPOINT, "test", per_task=16)
    assert np.mean(list(accuracy.values())) == pytest.approx(recipe["old_task_mean"]["test"], abs=0.04)


def test_learning_rates_were_chosen_by_the_stated_rule():
    from kore.demo.methods import TUNED

    tuned = json.loads(TUNED.read_text())
    assert set(tuned_learning_rates()) == set(METHODS)
    assert tuned["checkpoint_sha256"] == checked_checkpoint()[1]["sha256"]
    for name, by_rate in tuned["measured"].items():
        averages = {float(rate): np.mean([cell["avg"] for cell in cells]) for rate, cells in by_rate.items()}
        assert averages[tuned["chosen"][name]] == max(averages.values())


def test_climb_measures_both_neighbours_of_the_best():
    asked = []

    def measure(k):
        asked.append(k)
        return -((k - 3) ** 2)

    assert climb(0, measure) == 3
    assert sorted(asked) == [-1, 0, 1, 2, 3, 4]


@pytest.mark.slow
def test_one_cell_through_the_real_path(tmp_path):
    from rich.console import Console

    from kore.demo.comparison import Comparison

    budget = Budget(steps=3, batch_size=4, questions_per_fact=1, old_questions_per_task=1)
    comparison = Comparison(tmp_path, budget, Console(quiet=True))
    comparison.prepare()
    inputs, untouched = comparison.world(0)
    assert untouched["kr"] > 50
    cell = comparison.cell("kore", METHODS["kore"], inputs, 1e-2, 0)
    assert cell["history"][-1]["loss"] > 0
    assert {"ka", "kr", "avg"} <= set(cell)
    again = comparison.cell("kore", METHODS["kore"], inputs, 1e-2, 0)
    assert again.pop("skipped") and again == cell
    other = comparison.cell("kore", METHODS["kore"], inputs, 2e-2, 0)
    assert "skipped" not in other


def test_old_samples_are_balanced(tmp_path):
    files = write_old_samples(tmp_path, per_group=5)
    assert {name: len(json.loads(file.read_text())) for name, file in files.items()} == dict.fromkeys(files, 5)
