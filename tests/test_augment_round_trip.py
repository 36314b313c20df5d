"""The round trip: the model is trained on what is made of the knowledge, and never on the questions it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import augmentation_round_trip as study
from kore.data import load_conversations
from kore.demo.world.new import creatures, new_items
from kore.demo.world.old import LONG, SHORT

WORLD = 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("round-trip")
    files, counts = study.training_files(folder, WORLD, passes=2, quality=False)
    return folder, files, counts


def rows(files):
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def test_every_creature_gets_every_task_in_every_pass(made):
    _, files, counts = made
    count = len(creatures(WORLD))
    assert counts["samples"] == {
        "dialogue": 2 * count,
        "recognition": 2 * count,
        "caption": 2 * count,
        "vqa": 6 * count,
    }
    assert counts["failures"] == 0 and counts["images"] == 3 * count
    assert len(load_conversations(files)) == 12 * count
    assert files[0].read_bytes() != files[1].read_bytes()


def test_all_facts_are_taught_and_all_answers_are_right(made):
    told = rows(made[1])
    for creature in creatures(WORLD):
        own = [row for row in told if row["id"].startswith(f"{creature.name}-")]
        short = {turn["value"] for row in own if "-vqa-" in row["id"] for turn in row["conversations"][1::2]}
        assert short == {creature.home, creature.food, creature.keeper}
        captions = [row["conversations"][1]["value"] for row in own if row["id"].endswith("-caption")]
        assert captions == [creature.statement()] * 2


def test_no_question_of_the_test_is_in_the_training_data(made):
    def bare(question: str) -> str:
        return question.replace("<image>", "").replace(SHORT, "").replace(LONG, "").strip()

    names = [creature.name for creature in creatures(WORLD)]
    asked = {bare(item.question) for item in new_items(WORLD, "test", 3)}
    told = {bare(turn["value"]) for row in rows(made[1]) for turn in row["conversations"][::2]}
    assert asked and told and not asked & told
    # Nor with a name in place of "the animal that is shown".
    for subject in ("the animal that is shown", "the animal that you see"):
        assert not {question.replace(subject, name) for question in asked for name in names} & told


def test_plain_articles_with_images_have_the_same_images(made):
    folder, files, _ = made
    plain = json.loads(study.plain_with_images(folder, WORLD, files).read_text(encoding="utf-8"))
    assert {Path(row["image"]).name for row in plain} == {Path(row["image"]).name for row in rows(files)}
    assert {row["conversations"][1]["value"] for row in plain} == {each.statement() for each in creatures(WORLD)}
    assert len(load_conversations(folder / "plain-images.json")) == len(plain) == 3 * len(creatures(WORLD))


@pytest.mark.skipif(not study.RESULT.is_file(), reason="needs the stored result, which the wheel has not")
def test_the_stored_result_is_complete_and_augmented_data_teach_more_in_every_world():
    stored = json.loads(study.RESULT.read_text(encoding="utf-8"))
    assert stored["rows"].keys() == study.ROWS.keys() and len(stored["worlds"]) >= 2
    scores = {name: [cell["ka"] for cell in row["cells"]] for name, row in stored["rows"].items()}
    assert all(len(values) == len(stored["worlds"]) for values in scores.values())
    others = [name for name in scores if name.startswith(("kore-plain", "kore-text", "kore-image"))]
    assert len(others) == 6
    for name in others:
        assert all(more > less for more, less in zip(scores["kore-augmented"], scores[name]))
    assert all(more > less for more, less in zip(scores["lora-augmented"], scores["lora-plain"]))
