"""The quality report: what it counts, what it shows, and that its memory is bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kore.augmentation.quality import Drawn, Lengths, Quality, Repetitions, Shares, write_quality
from kore.augmentation.quality_page import _spread
from kore.augmentation.types import Candidate, Failure, ItemResult, KnowledgeItem, Sample, StoredImage

TEXT = "Zog the tower stands in Bern. It is 12 metres tall."


def image(folder: Path, name: str, colour: str) -> StoredImage:
    path = folder / f"{name}.png"
    Image.new("RGB", (8, 8), colour).save(path)
    return StoredImage(name, path, 8, 8, Candidate(path=path, licence="CC0"))


@pytest.fixture
def results(tmp_path):
    first, second = image(tmp_path, "one", "red"), image(tmp_path, "two", "blue")
    found = []
    for number in range(3):
        item = KnowledgeItem(f"i{number}", "entity", "tower", "Zog", TEXT)
        rounds = (("What is Zog?", "Zog is a tower."), ("Where is Zog?", "It stands in Bern."))
        samples = (
            Sample(f"i{number}-dialogue", item.id, "dialogue", rounds, first),
            Sample(f"i{number}-recognition", item.id, "recognition", (("Is it Zog?\nSay it.", "Yes"),), second, 0.75),
            Sample(f"i{number}-vqa-1", item.id, "vqa", (("How tall is this tower?", "12 metres"),), second, 0.25),
        )
        failures = (Failure(item.id, "caption", f"the model fell asleep: item {number}"),)
        found.append(ItemResult(item, samples, failures))
    return found


def test_numbers(results):
    quality = Quality()
    for result in results:
        quality.add(result)
    numbers = json.loads(json.dumps(quality.numbers()))
    assert numbers["items"] == {"entity": 3} and numbers["types"] == {"tower": 3}
    assert numbers["samples"] == {"dialogue": 3, "recognition": 3, "caption": 0, "vqa": 3}
    assert numbers["turns"]["dialogue"] == 6
    assert numbers["dialogue_rounds"] == {"mean": 2, "median": 2, "largest": 2}
    assert numbers["answer_words"]["recognition"]["mean"] == 1 and numbers["answer_words"]["caption"] is None
    assert (
        numbers["answers_found_in_text"]["vqa"]["mean"] == 1 and "recognition" not in numbers["answers_found_in_text"]
    )
    assert numbers["similarity"]["recognition"]["mean"] == 0.75 and numbers["similarity"]["dialogue"] is None
    assert numbers["licences"] == {"CC0": 9} and numbers["different_images"] == 2
    assert numbers["failures"] == [{"task": "caption", "reason": "the model fell asleep", "count": 3}]
    assert numbers["questions_repeated_within_item"] == 0
    # All three items ask the same four questions.
    assert numbers["wordings_repeated_across_items"] == pytest.approx(1 - 4 / 12)


def test_an_answer_that_is_not_in_the_text_and_a_question_asked_twice_are_seen(results):
    item = results[0].item
    # The first round is a template's, in whose words the text has no part.
    turns = (("What is it?", "Look."), ("Where is Zog?", "It stands in Madrid."), ("Where is Zog?", "Bern."))
    quality = Quality()
    quality.add(ItemResult(item, (Sample("d", item.id, "dialogue", turns, None),), ()))
    numbers = quality.numbers()
    found = numbers["answers_found_in_text"]["dialogue"]
    assert found["least"] < 1 and found["whole"] == 0.5 and found["mean"] == pytest.approx((1 + found["least"]) / 2)
    assert numbers["questions_repeated_within_item"] == pytest.approx(1 / 3)


def test_the_same_question_about_another_image_is_not_asked_twice(results, tmp_path):
    item = results[0].item
    samples = [
        Sample(f"v{name}", item.id, "vqa", (("Where is it?", "Bern"),), image(tmp_path, name, "red")) for name in "ab"
    ]
    quality = Quality()
    quality.add(ItemResult(item, tuple(samples), ()))
    assert quality.numbers()["questions_repeated_within_item"] == 0


def test_an_instruction_does_not_make_two_questions_alike(results):
    item = results[0].item
    asked = [("Who made it?", "A"), ("Who quickly made it?", "B")]
    samples = [
        Sample(name, item.id, "vqa", ((f"{question}\nReply with one word or a short phrase alone, please.", name),))
        for question, name in asked
    ]
    quality = Quality()
    quality.add(ItemResult(item, tuple(samples), ()))
    assert quality.numbers()["questions_repeated_within_item"] == 0


def test_words_are_counted_without_spaces_too(results):
    quality = Quality()
    quality.add(ItemResult(results[0].item, (Sample("c", "i0", "caption", (("什么桥", "大桥很长"),)),), ()))
    numbers = quality.numbers()
    assert numbers["question_words"]["caption"]["mean"] == 2 and numbers["answer_words"]["caption"]["mean"] == 2


def test_the_page_shows_images_conversations_and_failures(results, tmp_path):
    page = write_quality(tmp_path / "out", results, 0)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png") >= 2 + 9 and "<script" not in text and "http" not in text.split("<body")[1]
    for part in ("What is Zog?", "12 metres", "the model fell asleep", "CC0", "KORE-74K"):
        assert part in text
    assert "recognition, 0.75" in text or "visual question, 0.25" in text
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["items"] == {"entity": 3}
    again = write_quality(tmp_path / "again", list(results), 0)
    assert again.read_bytes() == page.read_bytes()


def test_text_is_escaped_and_missing_images_are_left_out(tmp_path):
    item = KnowledgeItem("x", "news", "<b>", "<script>alert(1)</script>", "Some text.")
    gone = StoredImage("gone", tmp_path / "gone.png", 1, 1, Candidate())
    sample = Sample("x-dialogue", "x", "dialogue", (("<script>", "a"),), gone)
    text = write_quality(tmp_path, [ItemResult(item, (sample,), ())]).read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_nothing_is_a_page_too(tmp_path):
    assert "0 items" in write_quality(tmp_path, []).read_text(encoding="utf-8")


def test_repetitions_are_exact_when_few_and_close_when_many():
    few = Repetitions(100)
    for thing in "aabbbc":
        few.add(thing)
    assert few.share() == pytest.approx(3 / 6) and few.different() == 3
    many = Repetitions(500)
    for number in range(20_000):
        many.add(str(number // 4))
    assert many.share() == pytest.approx(0.75, abs=0.01) and len(many._counts) <= 500
    assert many.different() == pytest.approx(5000, rel=0.2)
    assert Repetitions(5).share() == 0


def test_what_is_drawn_does_not_depend_on_the_order():
    ranks = {f"t{number}": (number * 7919) % 101 / 101 for number in range(100)}
    forth, back = Drawn(5), Drawn(5)
    for thing in ranks:
        forth.offer(ranks[thing], thing)
    for thing in reversed(ranks):
        back.offer(ranks[thing], thing)
    assert list(forth) == list(back) == sorted(ranks, key=ranks.get)[:5]


def test_the_middle_half():
    shares = Shares(low=-1.0)
    for number in range(100):
        shares.add(-0.95 + 0.1 * (number // 5))
    assert _spread(shares) == "-0.6 to 0.5"


def test_histograms():
    lengths = Lengths()
    for value in (1, 2, 9):
        lengths.add(value)
    assert lengths.numbers() == {"mean": 4, "median": 2, "largest": 9}
    shares = Shares(low=-1.0)
    for value in (-1.0, 0.0, 1.0, 1.2):
        shares.add(value)
    numbers = shares.numbers()
    assert sum(numbers["bins"]) == 4 and numbers["least"] == -1 and numbers["whole"] == 0.5
