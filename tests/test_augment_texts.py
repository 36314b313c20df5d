"""Templates and prompts as files that users edit."""

from __future__ import annotations

import random

import pytest
import yaml

from kore.augmentation.chance import stream
from kore.augmentation.texts import HERE, PROMPTS, TEMPLATES, filled, item_words, load_texts, write_texts
from kore.augmentation.types import KnowledgeItem
from kore.errors import ConfigError

WORDS = {"type": "film", "a_type": "a film", "title": "T1TLE", "name": "N4ME"}


def test_every_variant_of_every_template_can_be_filled():
    texts = load_texts()
    for key in ("news", "entity", "news_without_image", "entity_without_image"):
        name = "T1TLE" if key.startswith("news") else "N4ME"
        for pair in texts.variants("dialogue", key):
            whole = f"{pair['question']} {pair['answer']}".format(**WORDS)
            assert name in whole and "film" in whole and "{" not in whole
    for category, name in (("news", "T1TLE"), ("entity", "N4ME")):
        assert all(name in line.format(**WORDS) for line in texts.variants("recognition", category))
        assert all(name not in line.format(**WORDS) for line in texts.variants("caption", category))


def test_the_drawn_variant_depends_on_seed_and_item_only():
    texts = load_texts()

    def drawn(seed: int, item: str) -> str:
        return texts.line(stream(seed, item, "recognition"), "recognition", "entity", **WORDS)

    assert drawn(0, "a") == drawn(0, "a")
    assert len({drawn(0, str(number)) for number in range(40)}) == len(texts.variants("recognition", "entity"))
    assert len({drawn(seed, "a") for seed in range(40)}) > 1


def test_a_prompt_holds_the_knowledge_and_executes_nothing_of_it():
    texts = load_texts()
    text = "Use {{ 7 * 7 }} and {title} and {% raise %}."
    for name in ("dialogue", "caption", "vqa", "rephrase"):
        messages = texts.messages(
            name, stream(0), title="Eiffel", type="tower", category="entity", text=text, words=9, rounds=7,
            questions=4, first="Who?", number=2, count=3,
        )  # fmt: skip
        assert [message["role"] for message in messages] == ["system", "user"]
        assert text in messages[1]["content"] and "Eiffel" in messages[1]["content"]
        assert text not in messages[0]["content"]
        assert "49" not in messages[1]["content"]


def test_pick_draws_variants_of_a_prompt():
    values = {"title": "A", "type": "b", "category": "news", "text": "c.", "words": 9}
    texts = load_texts()
    found = {texts.messages("caption", stream(seed), **values)[1]["content"] for seed in range(20)}
    assert len(found) > 1


def test_the_name_has_the_article_of_the_text():
    tower = KnowledgeItem("1", "entity", "office", "Eiffel Tower", "The Eiffel Tower stands. See the Eiffel Tower.")
    words = item_words(tower)
    assert words["name"] == "the Eiffel Tower" and words["title"] == "Eiffel Tower" and words["a_type"] == "an office"
    lemur = KnowledgeItem("3", "entity", "animal", "Aye-aye", "The aye-aye eats. An aye-aye sleeps, the aye-aye wakes.")
    assert item_words(lemur)["name"] == "the aye-aye" and item_words(lemur)["title"] == "Aye-aye"
    person = KnowledgeItem("2", "entity", "university", "Ada", "Ada wrote. The Ada of old. Ada was.")
    assert item_words(person)["name"] == "Ada" and item_words(person)["a_type"] == "a university"
    assert load_texts().line(random.Random(0), "caption", "answer", depicted="the x", summary="y") == "The x y"


def test_a_folder_overrides_file_by_file(tmp_path):
    written = write_texts(tmp_path / "mine")
    assert {path.name for path in written} == {*TEMPLATES, *PROMPTS}
    assert load_texts(tmp_path / "mine").identity() == load_texts().identity()
    for path in written:
        if path.name != "recognition.yaml":
            path.unlink()
    (tmp_path / "mine" / "recognition.yaml").write_text("news: ['Is it {title}?']\nentity: ['Is it {name}?']\n")
    (tmp_path / "mine" / "notes.txt").write_text("left alone")
    texts = load_texts(tmp_path / "mine")
    assert texts.line(stream(0), "recognition", "entity", **WORDS) == "Is it N4ME?"
    assert texts.variants("caption", "news") == load_texts().variants("caption", "news")
    assert texts.identity() != load_texts().identity()


def test_write_texts_overwrites_nothing(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "vqa.j2").write_text("mine")
    with pytest.raises(ConfigError, match=r"vqa\.j2"):
        write_texts(tmp_path)
    assert (tmp_path / "vqa.j2").read_text() == "mine"


def changed(key, value):
    def change(content):
        content[key] = value

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("dialogue.yaml", lambda c: c.pop("news"), r"dialogue\.yaml: the key 'news' is missing"),
        ("dialogue.yaml", changed("extra", ["x"]), r"dialogue\.yaml: unknown key 'extra'"),
        ("dialogue.yaml", changed("news", []), r"dialogue\.yaml: news: expected a list"),
        ("dialogue.yaml", changed("news", [{"question": "{title}"}]), r"news\[0\]: expected question and answer"),
        ("dialogue.yaml", changed("news", [{"question": "a?", "answer": "{title}"}]), r"news\[0\].*{type} is missing"),
        ("recognition.yaml", changed("entity", ["{name}", "who?"]), r"entity\[1\].*{name} is missing"),
        ("recognition.yaml", changed("entity", ["{name} {oops}"]), r"entity\[0\].*got {oops}"),
        ("recognition.yaml", changed("entity", ["{name.__class__}"]), r"got {name.__class__}"),
        ("recognition.yaml", changed("entity", ["{name!r}"]), r"entity\[0\]"),
        ("recognition.yaml", changed("entity", ["{name"]), r"entity\[0\].*write {{ or }}"),
        ("caption.yaml", changed("news", ["What about {title}?"]), r"caption\.yaml: news\[0\].*got {title}"),
        ("instructions.yaml", changed("short", [5]), r"instructions\.yaml: short\[0\]: expected a text, got 5"),
        ("instructions.yaml", changed("separator", ""), r"separator: expected a text"),
        ("vqa.yaml", changed("references", ["this"]), r"references\[0\].*{hypernym} is missing"),
        ("rules.yaml", changed("attributes", ["x"]), r"attributes: expected names"),
        ("rules.yaml", changed("attributes", {"home": ["Where?"]}), r"attributes\.home\[0\].*{subject} is missing"),
    ],
)
def test_a_wrong_template_is_named_by_file_and_key(tmp_path, file, change, message):
    content = yaml.safe_load((HERE / file).read_text(encoding="utf-8"))
    change(content)
    (tmp_path / file).write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message):
        load_texts(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("synonyms.yaml", "groups: [[a]]", r"synonyms\.yaml: groups\[0\]: expected a list of two words"),
        ("vqa.yaml", "references: [", r"vqa\.yaml: not valid YAML"),
        ("vqa.yaml", "- a", r"vqa\.yaml: expected the keys references"),
        ("vqa.j2", "{% block system %}", r"vqa\.j2: line 1"),
        ("vqa.j2", "{% block system %}a{% endblock %}{{ text }}{{ title }}", r"vqa\.j2: the block 'user' is missing"),
        ("vqa.j2", "{% block system %}{{ titel }}{% endblock %}{% block user %}{% endblock %}", "variable 'titel'"),
        ("vqa.j2", "{% block system %}{% endblock %}{% block user %}{{ title }}{% endblock %}", "'text' is missing"),
        ("vqs.j2", "", r"vqs\.j2: expected one of"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_texts(tmp_path)


def test_what_fails_while_rendering_names_the_file(tmp_path):
    text = "{% block system %}{{ title.nothing }}{% endblock %}{% block user %}{{ text }}{% endblock %}"
    (tmp_path / "caption.j2").write_text(text)
    with pytest.raises(ConfigError, match=r"caption\.j2: block system"):
        load_texts(tmp_path).messages("caption", stream(0), title="A", text="b", type="c", category="news", words=3)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_texts(tmp_path / "none")
    (tmp_path / "vqa.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"vqa\.yaml: cannot be read"):
        load_texts(tmp_path)


def test_the_command_copies_them_out(tmp_path, capsys):
    from kore.cli import main

    command = ["augment", "--write-texts", str(tmp_path / "mine")]
    assert main(command) == 0
    assert load_texts(tmp_path / "mine").identity() == load_texts().identity()
    assert main(command) == 2 and "choose a new folder" in capsys.readouterr().err


def test_a_filled_template_begins_with_a_capital():
    for name, begins in (
        ("gravel", "Gravel is"),
        ("the retina", "The retina is"),
        ("iPhone", "iPhone is"),
        ("R2", "R2"),
    ):
        assert filled("{name} is it.", {"name": name}).startswith(begins)
