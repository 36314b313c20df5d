from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kore.data import load_conversations, load_questions
from kore.errors import DataError
from kore.fetch import image_size, open_image, resolve_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (6, 4), "red").save(tmp_path / name)
    return tmp_path


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_llava_rows_keep_images_roles_and_order(root: Path, suffix: str) -> None:
    rows = [
        {"id": "x", "image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>\nSame?", "Yes.")},
        {"id": "y", "image": None, "conversations": turns("Hello", "Hi.", "Bye", "Bye.")},
    ]
    loaded = load_conversations(write(root / f"d{suffix}", rows))
    assert [item.id for item in loaded] == ["x", "y"]
    assert [path.name for path in loaded[0].images] == ["a.png", "b.png"]
    assert [(m.role, m.text) for m in loaded[1].messages] == [
        ("user", "Hello"),
        ("assistant", "Hi."),
        ("user", "Bye"),
        ("assistant", "Bye."),
    ]
    assert loaded.bad_rows == ()


def test_sharegpt_and_openai_rows(root: Path) -> None:
    sharegpt = {
        "images": ["a.png"],
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "user", "value": "<image> What?"},
            {"from": "assistant", "value": "Red."},
        ],
    }
    parts = [{"type": "text", "text": "What? "}, {"type": "image_url", "image_url": {"url": "b.png"}}]
    openai = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "Red."},
        ]
    }
    loaded = load_conversations(write(root / "d.jsonl", [sharegpt, openai]))
    assert [m.role for m in loaded[0].messages] == ["system", "user", "assistant"]
    assert loaded[1].messages[1].text == "What? <image>\n"
    assert loaded[1].images[0].name == "b.png"
    assert [item.id for item in loaded] == ["0", "1"]


def test_places_are_file_and_line(root: Path) -> None:
    row = {"conversations": turns("Q", "A")}
    lines = write(root / "d.jsonl", [row, "", row])
    assert [item.source for item in load_conversations(lines)] == [f"{lines}:1", f"{lines}:3"]
    pretty = root / "d.json"
    pretty.write_text(json.dumps([row, row], indent=1))
    expected = [i for i, line in enumerate(pretty.read_text().splitlines(), 1) if line == " {"]
    assert [item.source for item in load_conversations(pretty)] == [f"{pretty}:{line}" for line in expected]


BAD = {
    "missing image": ({"image": "no.png", "conversations": turns("<image>Q", "A")}, "image not found"),
    "no such mark": ({"image": "a.png", "conversations": turns("Q", "A")}, "0 <image> mark"),
    "no image for a mark": ({"conversations": turns("<image>Q", "A")}, r"1 <image> mark.*0 image"),
    "outside": ({"image": "../out.png", "conversations": turns("<image>Q", "A")}, "outside the image root"),
    "link outside": ({"image": "link.png", "conversations": turns("<image>Q", "A")}, "outside the image root"),
    "not an image": ({"image": "text.png", "conversations": turns("<image>Q", "A")}, "cannot be read"),
    "url": ({"image": "https://x.y/z.png", "conversations": turns("<image>Q", "A")}, "is a URL"),
    "bytes": ({"image": {"bytes": "x"}, "conversations": turns("<image>Q", "A")}, "given as dict"),
    "role": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "bot", "value": "A"}]}, "role 'bot'"),
    "empty answer": ({"conversations": turns("Q", " ")}, "turn 2: empty answer"),
    "no answer": ({"conversations": turns("Q")}, "has no answer"),
    "two questions": ({"conversations": [*turns("Q"), *turns("Q")]}, "turn 2: expected a turn of the assistant"),
    "text is a number": ({"conversations": [{"from": "human", "value": 3}]}, "expected text, found int"),
    "image in answer": ({"image": "a.png", "conversations": turns("Q", "<image>")}, "only questions"),
    "no turns": ({"conversations": []}, "not empty"),
    "no list": ({"text": "Q"}, "expected 'conversations' or 'messages', found keys"),
    "not an object": (["Q", "A"], "expected an object"),
    "broken line": ('{"conversations": [', "broken JSON line"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_fail_with_their_line_or_are_skipped(root: Path, name: str) -> None:
    (root / "in").mkdir()
    Image.new("RGB", (2, 2)).save(root / "out.png")
    for image in ("a.png", "b.png"):
        (root / image).rename(root / "in" / image)
    (root / "in" / "link.png").symlink_to(root / "out.png")
    (root / "in" / "text.png").write_text("this is not an image")
    row, message = BAD[name]
    file = write(root / "in" / "d.jsonl", [{"conversations": turns("Q", "A")}, row])
    with pytest.raises(DataError, match=message) as caught:
        load_conversations(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert "\n" not in str(caught.value)
    loaded = load_conversations(file, on_bad_row="skip")
    assert len(loaded) == 1
    assert [bad.source for bad in loaded.bad_rows] == [f"{file}:2"]


def test_files_that_cannot_be_read(root: Path) -> None:
    cases = {
        "none.json": (None, "no such data file"),
        "d.txt": ("x", "expected a file named"),
        "empty.jsonl": ("\n", "no rows"),
        "cut.json": ('[{"conversations": []},\n {"conv', r"cut.json:2: broken JSON"),
        "object.json": ("{}", "expected a JSON array"),
        "more.json": ("[] []", "no rows|after the end"),
        "bytes.json": (b"\xff\xfe\xfa", "UTF-8"),
        "d.parquet": ("PAR1", "cannot be read as Parquet"),
    }
    for name, (content, message) in cases.items():
        if isinstance(content, bytes):
            (root / name).write_bytes(content)
        elif content is not None:
            (root / name).write_text(content)
        with pytest.raises(DataError, match=message):
            load_conversations(root / name)


def test_unknown_choices_name_the_choices(root: Path) -> None:
    file = write(root / "d.json", [{"conversations": turns("Q", "A")}])
    with pytest.raises(DataError, match="format: expected one of auto, llava"):
        load_conversations(file, format="alpaca")
    with pytest.raises(DataError, match="on_bad_row: expected fail or skip"):
        load_conversations(file, on_bad_row="ignore")
    with pytest.raises(DataError, match="unknown role 'user'"):
        load_conversations(
            write(root / "e.json", [{"conversations": [{"from": "user", "value": "Q"}]}]), format="llava"
        )


def test_max_samples_is_seeded_even_over_files_and_checks_only_what_it_draws(root: Path) -> None:
    def file(name: str, count: int) -> Path:
        return write(root / name, [{"id": f"{name}{i}", "conversations": turns("Q", "A")} for i in range(count)])

    files = [file("a.json", 20), file("b.json", 20), file("c.json", 2)]
    drawn = load_conversations(files, max_samples=14, seed=3)
    per_file = [sum(item.id.startswith(name) for item in drawn) for name in ("a", "b", "c")]
    assert per_file == [6, 6, 2]
    assert drawn == load_conversations(files, max_samples=14, seed=3)
    assert drawn != load_conversations(files, max_samples=14, seed=4)
    order = [int(item.id[6:]) for item in drawn if item.id.startswith("a")]
    assert order == sorted(order)
    rows = [{"id": i, "image": "no.png", "conversations": turns("<image>Q", "A")} for i in range(9)]
    mixed = write(root / "m.json", [*rows, {"id": "good", "conversations": turns("Q", "A")}])
    assert [item.id for item in load_conversations(mixed, max_samples=1, on_bad_row="skip")] == ["good"]


def test_questions(root: Path) -> None:
    rows = [
        {"question_id": 7, "image": "a.png", "text": "What colour?", "answer": "red", "type": "colour"},
        {"question_id": "8", "text": "2 + 2?", "answer": 4},
    ]
    first, second = load_questions(write(root / "q.jsonl", rows))
    assert (first.question_id, first.type, first.image.name) == ("7", "colour", "a.png")
    assert first.conversation().messages[0].text == "<image>\nWhat colour?"
    assert (second.answer, second.type, second.image) == ("4", "all", None)
    assert second.conversation().images == ()
    twice = write(root / "t.jsonl", [rows[0], rows[0], {**rows[1], "answer": ""}])
    with pytest.raises(DataError, match=r"t.jsonl:3: 'answer': expected text.*1 more bad row"):
        load_questions(twice)
    assert len(load_questions(twice, on_bad_row="skip")) == 1


def test_a_question_can_come_after_other_rounds(root: Path) -> None:
    row = {"question_id": 1, "image": "a.png", "text": "And the other?", "answer": "blue"}
    file = write(root / "q.jsonl", [{**row, "history": [["Which colour is left?", "red"]]}])
    texts = [(message.role, message.text) for message in load_questions(file)[0].conversation().messages]
    assert texts == [("user", "<image>\nWhich colour is left?"), ("assistant", "red"), ("user", "And the other?")]
    for wrong in ("red", [["only a question"]], [["one", 2]], [["one", "<image>"]]):
        with pytest.raises(DataError, match="'history': expected a list of"):
            load_questions(write(root / "w.jsonl", [{**row, "history": wrong}]))


def test_image_limits_orientation_and_truncation(root: Path) -> None:
    with pytest.raises(DataError, match="the limit is 10"):
        open_image(root / "a.png", max_bytes=10)
    with pytest.raises(DataError, match="6 x 4 pixels; the limit is 20"):
        image_size(root / "a.png", max_pixels=20)
    with pytest.raises(DataError, match="URL"):
        resolve_image("data:image/png;base64,AAAA", root)
    turned = Image.new("L", (6, 4), 90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)
    image = open_image(root / "turned.jpg")
    assert image.mode == "RGB" and (image.height, image.width) == (6, 4) == image_size(root / "turned.jpg")
    turned.save(root / "turned.png", exif=exif)
    assert image_size(root / "turned.png") == (6, 4) == open_image(root / "turned.png").size[::-1]
    Image.effect_noise((64, 64), 50).save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:900])
    file = write(root / "d.json", [{"image": "cut.jpg", "conversations": turns("<image>Q", "A")}])
    assert len(load_conversations(file)) == 1
    with pytest.raises(DataError, match=r"d.json:2: image .*cut.jpg cannot be decoded"):
        load_conversations(file, check_images="decode")


def test_header_check_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    Image.new("RGB", (6, 4)).save(root / "a.jpg")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert image_size(root / "a.png") == image_size(root / "a.jpg") == (4, 6)
