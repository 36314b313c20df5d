"""The example of real texts and images: where it comes from, what rules make of it, and what faults leave of it."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from benchmarks.augmentation_faults import MUST_BE_EMPTY, MUST_BE_ZERO, damaged, faults_of, leaks, measure
from benchmarks.augmentation_servers import EXAMPLE, KEYS
from kore.augmentation.config import AugmentConfig
from kore.augmentation.images.catalog import FolderCatalog
from kore.augmentation.items import load_knowledge
from kore.augmentation.run import augment
from kore.cli import main

ITEMS = list(load_knowledge(EXAMPLE / "knowledge.jsonl"))


def images():
    return {path.relative_to(EXAMPLE).as_posix(): path for path in sorted(EXAMPLE.rglob("*.jpg"))}


def test_every_image_has_its_source_and_every_source_its_image():
    rows = re.findall(r"^\| `((?:images|pictures)/\S+)` \| (.+?) \| .+? \| (\d+) x (\d+) \|$",
                      (EXAMPLE / "SOURCES.md").read_text("utf-8"), re.MULTILINE)  # fmt: skip
    files = images()
    assert sorted(row[0] for row in rows) == list(files)
    originals = dict(re.findall(r"^\| ([^`|]+?) \| ([^|]+?) \| .* \|$", (EXAMPLE / "SOURCES.md").read_text("utf-8"),
                                re.MULTILINE))  # fmt: skip
    free = ("public domain", "CC0 1.0", "CC BY 4.0", "no known copyright restrictions")
    for name, original, width, height in rows:
        assert originals[original].startswith(free), name
        with Image.open(files[name]) as image:
            assert image.size == (int(width), int(height)) and max(image.size) <= 384 and not image.getexif()
            image.load()
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*")) < 1_000_000
    used = {item.image.relative_to(EXAMPLE.resolve()).as_posix() for item in ITEMS if item.image}
    assert used == {name for name in files if name.startswith("images/")}


def test_the_pictures_are_described_with_their_licence():
    entries = FolderCatalog(EXAMPLE / "pictures").entries
    rows = [json.loads(line) for line in (EXAMPLE / "pictures" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [entry.place for entry in entries] == sorted(row["file_name"] for row in rows)
    assert all(entry.licence != "unknown" and entry.author and entry.page.startswith("http") for entry in entries)


def test_the_texts_are_of_both_sorts_and_of_a_readable_length():
    assert all(60 <= len(item.text.split()) <= 150 for item in ITEMS)
    assert {item.category for item in ITEMS} == {"news", "entity"} and sum(item.image is None for item in ITEMS) == 1
    # What a fact says stands in its text.
    assert all(value.lower() in item.text.lower() for item in ITEMS for value in item.facts.values())


def test_rules_make_all_tasks_of_it(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["augment", str(EXAMPLE / "knowledge.jsonl"), "-o", str(out), "--images", str(EXAMPLE / "pictures")]
    assert main(words) == 0 and "12 items, " in capsys.readouterr().out
    rows = json.loads((out / "llava.json").read_text("utf-8"))
    counts: dict[str, int] = {}
    for row in rows:
        task = next(part for part in row["id"].split("-")[::-1] if not part.isdigit())
        counts[task] = counts.get(task, 0) + 1
    assert counts == {"dialogue": 12, "recognition": 12, "caption": 12, "vqa": 46}
    assert (out / "failures.jsonl").read_text() == ""
    listed = {entry["image"]: entry for entry in json.loads((out / "images.json").read_text("utf-8"))}
    words_of = {item.id: set(re.findall(r"\w+", f"{item.title} {item.type}".lower())) for item in ITEMS}
    for row in rows:
        said = " ".join(turn["value"] for turn in row["conversations"])
        assert not re.search(r"\{|\}|\bNone\b|  |<image>.*<image>", said), said
        # Found pictures show what was searched: their titles share a word with it.
        title = listed[row["image"]]["title"].lower() if row.get("image") else ""
        item = next(name for name in words_of if row["id"].startswith(f"{name}-"))
        assert not title or words_of[item] & set(re.findall(r"\w+", title)), row["id"]


def test_what_the_fault_run_looks_for_is_found(tmp_path):
    assert damaged(tmp_path) == [] == leaks(tmp_path)
    (tmp_path / "a.json").write_text('{"half": ')
    (tmp_path / "b.jsonl").write_text('{}\n{"half')
    (tmp_path / "c.jpg").write_bytes((EXAMPLE / "images" / "cat.jpg").read_bytes()[:3000])
    (tmp_path / f"{'0' * 64}.jpg").write_bytes((EXAMPLE / "images" / "cat.jpg").read_bytes())
    (tmp_path / "d.json.tmp-x").write_text("{")
    (tmp_path / "log").write_text(f"key {KEYS['SERPAPI_API_KEY']}!")
    assert len(damaged(tmp_path)) == 4 and leaks(tmp_path) == [str(tmp_path / "log")]
    good = {name: [] for name in MUST_BE_EMPTY} | dict.fromkeys(MUST_BE_ZERO, 0)
    assert faults_of(good) == [] and faults_of({**good, "requests_inside": 1}) == ["requests_inside: 1"]


def test_nothing_stays_of_what_a_kill_left_half_written(tmp_path):
    """Killed within the very first write, or that of the manifest; beside a run there is no other writer."""
    knowledge = tmp_path / "knowledge.jsonl"
    knowledge.write_text(json.dumps({"type": "town", "name": "Arven", "text": "Arven lies at the river Solt."}) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    left = [out / ".run.json.tmp-1-0a0a0a0a", out / ".manifest.json.tmp-1-0b0b0b0b"]
    for path in left:
        path.write_text("{")
    config = AugmentConfig(tasks=["dialogue"], quality=False)
    augment(knowledge, config, out, progress=False)
    (out / "images").mkdir(exist_ok=True)
    (out / "images" / ".a.jpg.tmp-1").write_text("half")
    augment(knowledge, config, out, progress=False)
    assert not list(out.rglob(".*.tmp-*")) and (out / "llava.json").is_file()


@pytest.mark.slow
def test_faults_and_kills_change_nothing(tmp_path):
    result = measure(tmp_path, kills=2)
    assert faults_of(result) == []
    assert result["kills"] >= 1 and result["requests"]["again"] == 0, result
    assert len(result["chat_faults"]) >= 5 and len(result["picture_faults"]) >= 3
    assert result["samples"] == {"dialogue": 12, "recognition": 12, "caption": 11, "vqa": 36}
    assert [failure.partition(":")[0] for failure in result["failures"]] == ["chelsea caption"]
    assert set(result["images_not_had"]) >= {"truncated", "bomb", "to-an-inner-name", "to-another-host"}
