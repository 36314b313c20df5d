"""Reading pieces of knowledge: every format, every mistake with its file and line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from kore.augmentation.items import load_knowledge
from kore.errors import ConfigError, DataError
from tests.augment_knowledge import knowledge_row, write_knowledge

NEWS = {"type": "politics", "title": "A harbour opens", "text": "It has six docks."}
FILM = {"type": "film", "name": "Arvena", "text": "A film of 2019."}


def written(path: Path, *rows) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fields(item):
    return (item.id, item.category, item.type, item.title, item.text, dict(item.facts))


def test_all_formats_give_the_same_items(tmp_path):
    import datasets

    rows = [knowledge_row(number) for number in range(4)]
    every = [{name: row.get(name) for name in ("id", "type", "title", "name", "text", "facts")} for row in rows]
    flat = [{**row, "facts": json.dumps(row["facts"])} for row in every]
    expected = [fields(item) for item in load_knowledge(write_knowledge(tmp_path / "a.jsonl", 4, images=False))]
    assert [entry[1] for entry in expected] == ["entity", "news"] * 2 and expected[0][5]["year"] == "1990"

    (tmp_path / "a.json").write_text(json.dumps(every, indent=1))
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(flat[0]), delimiter=separator)
            table.writeheader()
            table.writerows(flat)
    table = datasets.Dataset.from_list(flat)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(every).save_to_disk(tmp_path / "structured")
    for name in ("a.json", "a.csv", "a.tsv", "a.parquet", "saved", "structured"):
        knowledge = load_knowledge(tmp_path / name)
        assert [fields(item) for item in knowledge] == expected, name
        assert len(knowledge) == 4 and [item.id for item in knowledge] == [row["id"] for row in rows]


def test_images_in_rows_become_files(tmp_path):
    import datasets

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("type", "name", "text")} | {"image": datasets.Image()}
    )
    pictures = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    rows = [{**FILM, "name": f"film {number}", "image": picture} for number, picture in enumerate(pictures)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="the row holds the image itself"):
        load_knowledge(tmp_path / "saved")
    items = list(load_knowledge(tmp_path / "saved", extract=tmp_path / "originals"))
    shown = [Image.open(io.BytesIO(item.image.read_bytes())).convert("RGB").getpixel((0, 0)) for item in items]
    assert shown == [(255, 0, 0), (0, 0, 255)]


def test_categories_ids_titles_and_facts(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        NEWS,
        {**FILM, "facts": {"year": 2019, "cast": ["A", "B"], "none": None}},
        {**NEWS, "name": "the opening", "category": "Entity", "id": 7},
        {**FILM, "title": " ", "facts": '{"by": "Solt"}', "id": "北京"},
    )
    items = list(load_knowledge(path))
    assert [item.category for item in items] == ["news", "entity", "entity", "entity"]
    assert [item.id for item in items] == ["000001", "000002", "7", "北京"]
    assert [item.title for item in items] == ["A harbour opens", "Arvena", "the opening", "Arvena"]
    assert items[1].facts == {"year": "2019", "cast": "A, B"} and items[3].facts == {"by": "Solt"}
    assert items[2].source == f"{path}:3"


def test_columns_of_other_names(tmp_path):
    path = written(tmp_path / "a.jsonl", {"kind": "film", "headline": "It opens", "body": "Now.", "text": "not this"})
    columns = {"type": "kind", "title": "headline", "text": "body"}
    (item,) = load_knowledge(path, columns=columns)
    assert (item.type, item.title, item.text) == ("film", "It opens", "Now.")
    with pytest.raises(ConfigError, match="knowledge has no column 'headline'; it has id, category"):
        load_knowledge(path, columns={"headline": "title"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken\n", "broken JSON line"),
        ("[1]\n", "expected an object with columns, found list"),
        ({**NEWS, "text": " "}, "'text': expected text that is not empty, found ' '"),
        ({"title": "x", "text": "y"}, r"no column 'type'; the row has 'title', 'text'. columns\.type names another"),
        ({**NEWS, "name": "x"}, "expected 'title' for news or 'name' for an entity, found both"),
        ({"type": "a", "text": "b"}, "found neither; a 'category' of news or entity tells which"),
        ({**NEWS, "category": "story"}, "'category': expected news or entity, found 'story'"),
        ({**NEWS, "id": "../x"}, "cannot be the name of a folder"),
        ({**NEWS, "id": "x" * 101}, "longer than 100 bytes"),
        ({**NEWS, "id": True}, "'id': expected a name or a number"),
        ({**NEWS, "text": "see <image> here"}, "the text holds <image>"),
        ({**NEWS, "facts": "{year"}, "'facts': expected a mapping as JSON text"),
        ({**NEWS, "facts": {"a": {"b": 1}}}, "'facts': expected text or numbers for 'a'"),
        ({**NEWS, "image": "../k.png"}, "outside the image root"),
        ({**NEWS, "image": "https://x.org/a.png"}, "is a URL"),
        ({**NEWS, "image": "broken.png"}, "cannot be read"),
        ({**NEWS, "id": "FIRST"}, "id 'FIRST' is there twice, first at line 1"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path, row, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    (tmp_path / "k.png").write_bytes(b"")
    path = written(tmp_path / "data" / "a.jsonl", {**FILM, "id": "first"}, row, {**NEWS, "id": "last"})
    with pytest.raises(DataError, match=message) as caught:
        load_knowledge(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    knowledge = load_knowledge(path, on_bad_row="skip")
    assert [item.id for item in knowledge] == ["first", "last"] and len(knowledge) == 2
    assert [bad.source for bad in knowledge.bad_rows] == [f"{path}:2"]


def test_broken_files_say_so(tmp_path):
    for name, content, message in (
        ("none.jsonl", None, "no such knowledge file"),
        ("a.txt", "x", r"expected a file named \*\.jsonl, .*or a directory written by"),
        ("empty.jsonl", "", "the file has no rows"),
        ("cut.csv", 'type,title,text\na,"b,c\n', "broken CSV"),
        ("twice.csv", "type,type\n", "two columns are named 'type'"),
        ("bytes.csv", b"type,title,text\na,b,\xff\n", "cannot be read as UTF-8"),
        ("bad.csv", "type,title,text\na,b\n", r"bad\.csv:2: expected 3 columns, found 2"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=message):
            load_knowledge(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be read as a dataset directory"):
        load_knowledge(tmp_path / "folder")
    with pytest.raises(DataError, match="no usable row; the first problem: "):
        load_knowledge(written(tmp_path / "b.jsonl", {}), on_bad_row="skip")


def test_lines_are_right_where_a_row_has_several(tmp_path):
    (tmp_path / "a.csv").write_text('type,title,text\na,b,"one\ntwo"\n\na,c,\n')
    with pytest.raises(DataError, match=r"a\.csv:5: 'text': expected text that is not empty"):
        load_knowledge(tmp_path / "a.csv")


def test_the_first_items_only_and_no_change_between_passes(tmp_path):
    path = write_knowledge(tmp_path / "a.jsonl", 5, images=False)
    knowledge = load_knowledge(path, max_items=2)
    assert [item.id for item in knowledge] == [item.id for item in knowledge] == ["film-0", "news-1"]
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="the file changes while it is read"):
        next(iter(knowledge))
