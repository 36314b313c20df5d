"""The files of an augmentation: what other programs read, and what KORE's own loader makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from kore.augmentation.export import reason_kind, write_outputs
from kore.augmentation.types import Candidate, Failure, ItemResult, KnowledgeItem, Sample, StoredImage
from kore.data import load_conversations

EVERY = ("llava", "sharegpt", "openai", "plain")


def stored(folder: Path, name: str, **about) -> StoredImage:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (12, 8), name).save(folder / f"{name}.png")
    return StoredImage(name * 3, folder / f"{name}.png", 12, 8, Candidate(**about))


@pytest.fixture
def results(tmp_path):
    red = stored(tmp_path / "store", "red", path=tmp_path / "original.jpg")
    blue = stored(tmp_path / "store", "blue", url="https://x.org/b", licence="CC BY 4.0", author="Ä. Maler", page="p")
    film = KnowledgeItem("f", "entity", "film", "Arvena", "A film of 2019.\nBy Solt.", source="k.jsonl:1")
    news = KnowledgeItem("n", "news", "politics", "It opens", "Now.", source="k.jsonl:2")
    return [
        ItemResult(
            film,
            (
                Sample("f-dialogue", "f", "dialogue", (("What is this?", "Arvena."), ("Who?", 'By "Solt"…')), red),
                Sample("f-caption", "f", "caption", (("Describe it.", "A film."),), blue, 0.75),
            ),
            (Failure("f", "vqa", "no image: the search for 'Solt' found none"),),
        ),
        ItemResult(news, (Sample("n-dialogue", "n", "dialogue", (("What happened?", "It opens."),)),), ()),
    ]


def test_all_formats_say_the_same(results, tmp_path):
    out = tmp_path / "out"
    tally, files = write_outputs(results, out, formats=EVERY)
    assert (tally.items, tally.images, tally.failures) == (2, 2, 1)
    assert tally.samples == {"dialogue": 2, "caption": 1} and tally.turns == {"dialogue": 3, "caption": 1}
    assert sorted(files) == sorted(path for path in out.rglob("*") if path.is_file())

    llava = json.loads((out / "llava.json").read_text())
    assert llava[0] == {
        "id": "f-dialogue",
        "image": "images/red.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "Arvena."},
            {"from": "human", "value": "Who?"},
            {"from": "gpt", "value": 'By "Solt"…'},
        ],
    }
    assert "image" not in llava[2] and "<image>" not in llava[2]["conversations"][0]["value"]
    rows = {name: load_conversations(out / name) for name in ("llava.json", "sharegpt.json", "openai.jsonl")}
    read = {name: [(row.id, row.images, row.messages) for row in table] for name, table in rows.items()}
    assert read["llava.json"] == read["sharegpt.json"] == read["openai.jsonl"]
    assert read["llava.json"][0][1] == ((out / "images" / "red.png").resolve(),)

    (plain, other) = json.loads((out / "plain.json").read_text())
    assert plain["image"] == "images/red.png"
    assert [turn["value"] for turn in plain["conversations"]] == ["<image>\nWhat is this?", "A film of 2019.\nBy Solt."]
    assert other["id"] == "n-plain"


def test_llama_factory_finds_the_data(results, tmp_path):
    write_outputs(results, tmp_path / "out", formats=["sharegpt"], name="my_films")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert list(info) == ["my_films"]
    entry = info["my_films"]
    rows = json.loads((tmp_path / "out" / entry["file_name"]).read_text())
    assert entry["formatting"] == "sharegpt"
    for row in rows:
        turns, images = row[entry["columns"]["messages"]], row[entry["columns"]["images"]]
        # Its reader wants turns of human and gpt in turn, and as many marks as images.
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(turn["value"].count("<image>") for turn in turns) == len(images)
        assert all((tmp_path / "out" / image).is_file() for image in images)


def test_images_in_openai_messages_as_data(results, tmp_path):
    import base64

    write_outputs(results, tmp_path / "out", formats=["openai"], openai_images="data")
    first = json.loads((tmp_path / "out" / "openai.jsonl").read_text().splitlines()[0])
    assert first["messages"][2] == {"role": "user", "content": "Who?"}
    kind, _, data = first["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png" and base64.b64decode(data) == (tmp_path / "store" / "red.png").read_bytes()


def test_licences_and_failures_are_listed(results, tmp_path):
    tally, _ = write_outputs(results, tmp_path / "out")
    red, blue = json.loads((tmp_path / "out" / "images.json").read_text())
    assert (blue["image"], blue["licence"], blue["author"], blue["url"]) == (
        "images/blue.png",
        "CC BY 4.0",
        "Ä. Maler",
        "https://x.org/b",
    )
    assert red["licence"] == "unknown" and red["file"] == "original.jpg" and red["width"] == 12
    (failure,) = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert failure == {
        "item": "f",
        "task": "vqa",
        "reason": "no image: the search for 'Solt' found none",
        "source": "k.jsonl:1",
    }
    assert tally.reasons == {("vqa", "no image"): 1}
    assert reason_kind("question 3: no image: the search for 'a' retained none") == "no image"


def test_what_is_not_asked_for_any_more_goes(results, tmp_path):
    out = tmp_path / "out"
    write_outputs(results, out, formats=EVERY)
    write_outputs(results[1:], out)
    assert sorted(path.name for path in out.iterdir()) == ["failures.jsonl", "images", "images.json", "llava.json"]
    assert not list((out / "images").iterdir()) and json.loads((out / "images.json").read_text()) == []
    write_outputs([], out)
    assert json.loads((out / "llava.json").read_text()) == []


def test_a_failing_write_leaves_the_old_files(results, tmp_path):
    out = tmp_path / "out"
    write_outputs(results, out)
    before = (out / "llava.json").read_bytes()

    def breaks():
        yield results[1]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_outputs(breaks(), out)
    assert (out / "llava.json").read_bytes() == before
    assert not [path for path in out.iterdir() if ".tmp-" in path.name]


def test_what_a_killed_process_has_left_goes(results, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    killed, living = out / ".llava.json.tmp-999999999", out / f".llava.json.tmp-{os.getppid()}"
    for file in (killed, living):
        file.write_text("half")
    write_outputs(results, out)
    assert not killed.exists() and living.exists()


def test_images_are_listed_as_they_are_used_and_once(results, tmp_path):
    tally, files = write_outputs([results[0], results[0]], tmp_path / "out")
    listed = [entry["image"] for entry in json.loads((tmp_path / "out" / "images.json").read_text())]
    assert listed == ["images/red.png", "images/blue.png"] and tally.images == 2
    assert {path.name for path in files} >= {"red.png", "blue.png"}


def test_the_loader_of_llama_factory_reads_the_file(results, tmp_path):
    """It loads the JSON by ``datasets``, and drops conversations whose turns do not alternate between its default tags.

    Rows without an image must not give the column another type than rows with one.
    """
    import datasets

    write_outputs([*reversed(results)], tmp_path / "out", formats=["sharegpt"], name="films")
    (entry,) = json.loads((tmp_path / "out" / "dataset_info.json").read_text()).values()
    assert set(entry) == {"file_name", "formatting", "columns"}, "tags, where there are any, have to be complete"
    file = str(tmp_path / "out" / entry["file_name"])
    table = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["images"] for row in table] == [[], ["images/red.png"], ["images/blue.png"]]
    turns = [[turn["from"] for turn in row["conversations"]] for row in table]
    assert turns == [["human", "gpt"], ["human", "gpt"] * 2, ["human", "gpt"]]
    assert all(set(turn) == {"from", "value"} for row in table for turn in row["conversations"])
