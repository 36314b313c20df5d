"""General augmentation: what each of the four methods changes, and what it leaves alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from kore.augmentation.ask import NotGenerated
from kore.augmentation.general import GENERAL, Rephrased, augment_general, rephrasing_faults
from kore.augmentation.general.pictures import altered
from kore.augmentation.general.words import disturbed
from kore.augmentation.generators.rules import RulesGenerator
from kore.augmentation.images.store import ImageStore
from kore.augmentation.texts import load_texts
from kore.augmentation.types import KnowledgeItem, Request
from kore.errors import ConfigError, KoreError, Unavailable

TEXTS = load_texts()
GROUPS = TEXTS.variants("synonyms", "groups")
TEXT = "The large tower stands in Paris, where Gustave Eiffel built it in 1889. It is very famous and 330 metres tall."


class Images:
    def __init__(self, folder):
        self.store = ImageStore(folder)


class Asker:
    def __init__(self, *answers):
        self.answers, self.prompts = list(answers), []

    def ask(self, task, item, messages, schema, check, max_tokens):
        self.prompts.append(messages[1]["content"])
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        accepted, reasons = check(schema(text=answer))
        if accepted is None:
            raise NotGenerated(" ".join(reasons))
        return accepted


@pytest.fixture
def item(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "original.png")
    return KnowledgeItem("x", "entity", "tower", "Eiffel Tower", TEXT, tmp_path / "original.png")


def make(item, method, tmp_path, asker=None, seed=0, samples=8):
    return augment_general(item, method, TEXTS, asker, Images(tmp_path / "store"), seed, samples=samples)


@pytest.mark.parametrize("method", ["text-agnostic", "image-aware", "image-agnostic"])
def test_the_number_asked_for_the_first_unchanged(item, tmp_path, method):
    result = make(item, method, tmp_path)
    assert result.failures == () and len({sample.id for sample in result.samples}) == 8
    first = result.samples[0]
    assert first.turns[0][1] == TEXT
    texts = {sample.turns[0][1] for sample in result.samples}
    images = {sample.image.sha256 for sample in result.samples}
    assert (len(texts), len(images)) == ((8, 1) if method == "text-agnostic" else (1, 8))
    assert len({sample.turns[0][0] for sample in result.samples}) == 1
    again = make(item, method, tmp_path / "again")
    assert [(each.turns, each.image.sha256) for each in again.samples] == [
        (each.turns, each.image.sha256) for each in result.samples
    ]
    other = make(item, method, tmp_path, seed=1)
    assert [each.turns[0][1] + each.image.sha256 for each in other.samples[1:]] != [
        each.turns[0][1] + each.image.sha256 for each in result.samples[1:]
    ]


def test_a_changed_image_says_where_it_comes_from_and_no_file_of_it_is_left(item, tmp_path):
    result = make(item, "image-aware", tmp_path, samples=2)
    changed = result.samples[1].image
    assert changed.candidate.path == item.image and "changed" in changed.candidate.title
    assert changed.path.is_file() and changed.path.parent == tmp_path / "store"


def test_rephrasing_asks_for_each_version_and_keeps_what_is_right(item, tmp_path):
    good = "In Paris stands the tower that Gustave Eiffel built in 1889; it is famous and 330 metres tall."
    asker = Asker(good, good, Unavailable("busy"))
    result = make(item, "text-aware", tmp_path, asker, samples=4)
    assert [sample.turns[0][1] for sample in result.samples] == [TEXT, good]
    assert "given already" in result.failures[0].reason and "(version 2)" in result.failures[0].reason
    assert result.failures[1].passing
    assert len(set(asker.prompts)) == 3 and all(TEXT in prompt for prompt in asker.prompts)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (TEXT, None),
        (TEXT.replace("1889", "1890"), "1889"),
        (TEXT.replace("1889", "the past"), "lacks 1889"),
        (TEXT.replace("famous", "famous since 1900"), "1900"),
        (TEXT.replace("Gustave Eiffel", "engineer Pablo Picasso"), "names Pablo, Picasso"),
        (TEXT.replace("Gustave Eiffel", "a man"), "lacks Eiffel, Gustave; keep every name"),
        ("In 1889, 330.", "keep between"),
        (TEXT + " " + TEXT, "keep between"),
    ],
)
def test_what_a_rephrasing_may_not_do(item, text, fault):
    faults = " ".join(rephrasing_faults(item, text))
    assert (fault in faults) if fault else not faults


def test_words_with_capitals_are_no_names_in_german():
    text = "Der Turm steht in Ulm und ist das höchste Bauwerk der Stadt."
    item = KnowledgeItem("t", "entity", "Turm", "Turm", text)
    assert rephrasing_faults(item, "In Ulm steht der Turm, das höchste Gebäude der Stadt.") == []


def test_the_generator_by_rules_cannot_rephrase():
    with pytest.raises(KoreError, match="language model"):
        RulesGenerator().generate(Request("dialogue", KnowledgeItem("x", "news", "a", "b", "c."), (), Rephrased, 9))


def test_a_change_of_words_is_one_of_three_and_small():
    words = TEXT.split()
    kinds = set()
    for seed in range(60):
        changed = disturbed(TEXT, GROUPS, random.Random(seed)).split()
        if len(changed) < len(words):
            kinds.add("deleted")
            assert len(words) - len(changed) == 2
        elif sorted(changed) == sorted(words):
            kinds.add("swapped")
        else:
            kinds.add("replaced")
            new = [(old, now) for old, now in zip(words, changed) if old != now]
            assert 1 <= len(new) <= 2
            for old, now in new:
                assert any(old.strip(".,").lower() in group and now.strip(".,").lower() in group for group in GROUPS)
    assert kinds == {"deleted", "swapped", "replaced"}


def test_words_keep_their_capital_and_comma():
    found = {disturbed("Large, xyz", [["large", "big"]], random.Random(seed)) for seed in range(30)}
    assert "Big, xyz" in found


def test_a_mild_change_stays_near_and_a_strong_one_does_not():
    ramp = np.linspace(60, 200, 64, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (64, 1))] * 3, -1))

    def distance(aware, seed):
        changed = altered(image, aware, random.Random(seed))
        assert changed.mode == "RGB"
        return np.abs(np.asarray(changed.resize((64, 64)), float) - np.asarray(image, float)).mean()

    mild = [distance(True, seed) for seed in range(20)]
    strong = [distance(False, seed) for seed in range(20)]
    assert 0 < max(mild) < 45 < np.mean(strong)


def test_the_smallest_image_survives_both():
    for aware in (True, False):
        for seed in range(10):
            assert min(altered(Image.new("RGB", (1, 1), "red"), aware, random.Random(seed)).size) >= 1


def test_what_cannot_be_made_says_why(tmp_path):
    bare = KnowledgeItem("x", "news", "politics", "Title", "Word.")
    result = make(bare, "image-aware", tmp_path)
    assert len(result.samples) == 1 and "no image to change" in result.failures[0].reason
    result = make(bare, "text-agnostic", tmp_path)
    assert len(result.samples) == 1 and "too few words" in result.failures[0].reason
    with pytest.raises(ConfigError, match="image-agnostic"):
        make(bare, "both", tmp_path)
    assert len(GENERAL) == 4
