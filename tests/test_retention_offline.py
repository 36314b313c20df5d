"""The table of the twelve benchmarks and the offline suite: every metric in exact arithmetic, and a run that stops."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from kore.data import Encoder
from kore.errors import ArtifactError, ConfigError, DataError
from kore.models import load_model
from kore.retention import marks, offline
from kore.retention.benchmarks import BENCHMARKS, DIMENSIONS, key_of, select
from kore.retention.marks import anls, chosen_option, edit_distance, mark, said_yes
from tests.tiny import save_tiny, tiny_conversations


def test_the_table_is_the_papers():
    """Table 1's dimensions, with the benchmarks and their order of Table 2."""
    assert [(one.name, one.dimension) for one in BENCHMARKS] == [
        ("MME", "COM"), ("MMBench", "COM"), ("SEEDBench2_Plus", "OCR"), ("OCRVQA", "OCR"), ("ScienceQA", "M-DIS"),
        ("MMMU", "M-DIS"), ("MIA-Bench", "INS"), ("MMDU", "M-IDU"), ("MathVista", "MAT"), ("MathVision", "MAT"),
        ("POPE", "HAL"), ("HallusionBench", "HAL"),
    ]  # fmt: skip
    assert list(dict.fromkeys(one.dimension for one in BENCHMARKS)) == list(DIMENSIONS)
    assert len({one.key for one in BENCHMARKS}) == 12
    assert [one.name for one in BENCHMARKS if one.lmms_eval is None] == ["OCRVQA", "MMDU"]


@pytest.mark.parametrize("engine", ["lmms-eval", "vlmevalkit"])
def test_every_task_is_complete_and_unique(engine):
    tasks = [task for one in BENCHMARKS if (task := one.task(engine))]
    assert len({task.name for task in tasks}) == len(tasks) == {"lmms-eval": 10, "vlmevalkit": 12}[engine]
    for task in tasks:
        assert task.keys and task.scale > 0
        if engine == "vlmevalkit":
            assert task.kind and len(task.md5) == 32 and int(task.md5, 16)


def test_mme_is_brought_to_a_hundred():
    """1510 + 355.64 of 2800 points is the 66.63 of the paper's untouched 7B model; all right is 100."""
    mme = BENCHMARKS[0]
    ours = {"mme_perception_score": 1510.0, "mme_cognition_score": 355.64}
    assert mme.lmms_eval.score(ours) == pytest.approx(66.63, abs=0.005)
    assert mme.lmms_eval.score({"mme_perception_score": 2000, "mme_cognition_score": 800}) == pytest.approx(100)
    assert mme.vlmevalkit.score({"perception": 2000, "reasoning": 800, "OCR": 200}) == pytest.approx(100)


def test_scores_of_every_range_and_what_is_no_score():
    by_name = {one.name: one for one in BENCHMARKS}
    assert by_name["POPE"].lmms_eval.score({"pope_f1_score": 0.5, "pope_accuracy": 1.0}) == 50
    three = {"aAcc": 60.0, "qAcc": 20.0, "fAcc": 10.0}
    assert by_name["HallusionBench"].lmms_eval.score(three) == pytest.approx(30)
    assert by_name["ScienceQA"].vlmevalkit.score({"split=test|Overall": 0.7, "split=test|biology": 1}) == 70
    assert by_name["MathVista"].lmms_eval.score({"llm_as_judge_eval": None}) == 0
    for metrics in ({}, {"pope_f1_score": float("nan")}, {"pope_f1_score": None}, {"pope_f1_score": "1"}):
        with pytest.raises(KeyError, match="pope_f1_score"):
            by_name["POPE"].lmms_eval.score(metrics)
    with pytest.raises(KeyError, match="Overall"):  # which split it is cannot be told
        by_name["ScienceQA"].vlmevalkit.score({"split=test|Overall": 0.7, "split=dev|Overall": 0.6})


def test_benchmarks_are_selected_by_any_spelling():
    assert select(["all"]) == list(BENCHMARKS)
    assert [one.name for one in select(["pope", "mia_bench", "MIA-Bench", "mme"])] == ["MME", "MIA-Bench", "POPE"]
    with pytest.raises(ConfigError, match=r"expected all, or some of MME, .* got 'popes'"):
        select(["mme", "popes"])
    with pytest.raises(ConfigError, match="expected all"):
        select([""])
    assert key_of("MIA-Bench") == "mia_bench"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B. a dog", 1), ("B) because it barks", 1), ("**B**", 1),
        ("The answer is B", 1), ("Answer: (b)", 1), ("Option B is right", 1), ("I choose B", 1),
        ("a dog", 1), ("It is a dog.", 1), ("A dog", 1), ("A cat", 0), ("a big dog", 2), ("That is a big dog", 2),
        ("A", 0), ("A dog or a cat", None), ("neither", None), ("", None), ("E", None), ("B or C", None),
        ("A horse stands there, so D", 3), ("The answer is A, not B. No: the answer is C.", 2),
    ],
)  # fmt: skip
def test_how_a_choice_is_read(reply, expected):
    assert chosen_option(reply, ["cat", "dog", "big dog", "none of these"]) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes", True), ("yes.", True), ("No", False), ("no, it is red", False), ("'Yes'", True),
        ("There is not a dog", False), ("It isn't there", False), ("I would say yes", True), ("", None),
        ("maybe", None), ("It is not clear, yes", None), ("Yes, there is no dog", True), ("Northern lights", None),
        ("I know", None),
    ],
)  # fmt: skip
def test_how_yes_and_no_are_read(reply, expected):
    assert said_yes(reply) is expected


def test_edit_distance_and_anls():
    assert [edit_distance(*pair) for pair in (("", ""), ("a", ""), ("kitten", "sitting"), ("flaw", "lawn"))] == [
        0, 1, 3, 2,
    ]  # fmt: skip
    assert anls("STOP ", ["stop"]) == 1
    assert anls("stap", ["stop", "go"]) == 0.75
    assert anls("stxx", ["stop"]) == 0  # half of it is wrong: not below the threshold
    assert anls("", ["a"]) == 0


def item(answer, kind="all", pair="", options=(), right=-1, number=[0]):  # noqa: B006
    number[0] += 1
    answers = (answer,) if isinstance(answer, str) else tuple(answer)
    return offline.Item(str(number[0]), None, "?", answers, kind, tuple(options), right, pair)


def test_yes_no_metrics_are_those_of_pope():
    items = [item(answer) for answer in ["yes"] * 4 + ["no"] * 4]
    replies = ["Yes", "yes", "No", "who knows", "no", "No", "Yes", "hm"]
    found = mark("yes-no", "f1", items, replies)
    # Said yes: 2 of the 4 true ones and 1 false one. Right: 2 + 2 of 8.
    assert found.metrics["accuracy"] == 50
    assert found.metrics["precision"] == pytest.approx(100 * Fraction(2, 3))
    assert found.metrics["recall"] == 50
    assert found.metrics["f1"] == pytest.approx(100 * Fraction(4, 7))
    assert found.metrics["yes_share"] == 37.5 and found.metrics["unread"] == 25
    assert float(found.statistic(found.units.mean(0))) == pytest.approx(Fraction(4, 7))
    assert found.read == ["yes", "yes", "no", None, "no", "no", "yes", None]
    assert "accuracy_plus" not in found.metrics


def test_nobody_says_yes_is_an_f1_of_zero():
    found = mark("yes-no", "f1", [item("no"), item("no")], ["no", "no"])
    assert found.metrics["f1"] == found.metrics["precision"] == found.metrics["recall"] == 0
    assert float(found.statistic(found.units.mean(0))) == 0 and found.metrics["accuracy"] == 100


def test_accuracy_plus_and_mme():
    """Two types: 2 pairs with 3 of 4 right and 1 whole pair, 1 pair with 1 of 2 right."""
    items = [item("yes", "count", "a"), item("no", "count", "a"), item("yes", "count", "b"), item("no", "count", "b")]
    items += [item("yes", "scene", "a"), item("no", "scene", "a")]
    replies = ["yes", "no", "yes", "yes", "no", "no"]
    found = mark("yes-no", "mme", items, replies)
    assert found.metrics["accuracy_plus"] == pytest.approx(100 * Fraction(1, 3))
    exact = ((Fraction(3, 4) + Fraction(1, 2)) / 2 + (Fraction(1, 2) + 0) / 2) / 2
    assert found.metrics["mme"] == pytest.approx(100 * exact)
    assert 100 * float(found.statistic(found.units.mean(0))) == pytest.approx(100 * exact)
    # A type that a draw leaves out does not count in it.
    only_scene = found.units[2][None]
    assert np.allclose(found.statistic(only_scene), 0.25)


@pytest.mark.parametrize(
    ("kind", "score", "replies", "marks"),
    [
        ("ocr", "anls", ["HALT", "nint", "the red square"], [1, Fraction(3, 4), 1 - Fraction(4, 14)]),
        ("ocr", "contains", ["do  stop!", "nin", "the Red square here"], [1, 0, 1]),
        ("ocr", "exact", ["stop", "nine", "the red square"], [1, 1, 0]),
        ("short-answer", "cem", ["Stop", "nineteen", "a red square, I think"], [1, 0, 1]),
        ("short-answer", "exact", ["stop!", "nine", "a red square, I think"], [1, 1, 0]),
        ("open", "f1", ["stop", "nineteen", "a red square and a dog"], [1, 0, Fraction(4, 6)]),
    ],
)
def test_scores_of_texts(kind, score, replies, marks):
    items = [item(["Stop", "halt"]), item("nine"), item("red square")]
    found = mark(kind, score, items, replies)
    assert found.marks == pytest.approx([float(one) for one in marks])
    assert found.metrics[score] == pytest.approx(float(100 * sum(marks) / 3))
    assert 100 * float(found.statistic(found.units.mean(0))) == pytest.approx(found.metrics[score])


def write(file, header, rows):
    lines = [{"benchmark": header}, *rows]
    if file.suffix == ".json":
        file.write_text(json.dumps(lines))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


CHOICE = {"name": "Animals", "dimension": "COM", "kind": "multiple-choice"}
ROW = {"question_id": 1, "text": "Which?", "options": ["cat", "dog"], "answer": "B"}


@pytest.mark.parametrize("answer", ["B", "dog", "The dog."])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_choice_may_be_answered_by_letter_or_text(tmp_path, answer, suffix):
    one = offline.load_set(write(tmp_path / f"a{suffix}", CHOICE, [{**ROW, "answer": answer}]))
    assert one.score == "accuracy" and one.items[0].right == 1 and one.items[0].answers == ("dog",)
    assert one.items[0].text == f"Which?\nA. cat\nB. dog\n{offline.PROMPTS['multiple-choice']}"
    lettered = {**ROW, "options": {"A": "cat", "B": "dog"}, "answer": answer}
    assert offline.load_set(write(tmp_path / f"b{suffix}", {**CHOICE, "prompt": ""}, [lettered])).items[0].right == 1


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ({"name": "A"}, ROW, r"a\.jsonl:1: 'benchmark' needs 'dimension'"),
        ({**CHOICE, "kind": "guess"}, ROW, "kind: expected one of multiple-choice, yes-no"),
        ({**CHOICE, "score": "f1"}, ROW, "score of multiple-choice: expected accuracy, got 'f1'"),
        ({**CHOICE, "promt": "x"}, ROW, "unknown key 'promt'"),
        (CHOICE, {**ROW, "answer": "C"}, r"a\.jsonl:2: 'answer': expected a letter of AB or the text of an option"),
        (CHOICE, {**ROW, "options": ["B", "A"], "answer": "A"}, "the letter of one option and the text of another"),
        (CHOICE, {**ROW, "options": ["cat"]}, "expected 2 to 26, found 1"),
        (CHOICE, {**ROW, "options": ["cat", "cat"]}, "two are the same"),
        (CHOICE, {**ROW, "options": {"A": "cat", "C": "dog"}}, "the letters A, B, C, ... in order"),
        (CHOICE, {key: value for key, value in ROW.items() if key != "options"}, "'options': expected a list"),
        ({**CHOICE, "kind": "open"}, ROW, "'options' belong to multiple-choice"),
        ({**CHOICE, "kind": "yes-no"}, {"question_id": 1, "text": "?", "answer": "maybe"}, "expected yes or no"),
        (
            {**CHOICE, "kind": "yes-no", "score": "mme"},
            {"question_id": 1, "text": "?", "answer": "yes"},
            "score 'mme' needs 'pair' in every row",
        ),
        (CHOICE, {**ROW, "image": "no.png"}, r"a\.jsonl:2: .*image not found"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, header, row, message):
    with pytest.raises(DataError, match=message):
        offline.load_set(write(tmp_path / "a.jsonl", header, [row]))


def test_files_without_header_questions_or_own_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(DataError, match="expected the set's description first"):
        offline.load_set(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="has no questions"):
        offline.load_set(write(tmp_path / "b.jsonl", CHOICE, []))
    with pytest.raises(DataError, match=r"c\.jsonl:3: question_id '1' is that of .*c\.jsonl:2"):
        offline.load_set(write(tmp_path / "c.jsonl", CHOICE, [ROW, ROW]))
    files = [
        write(tmp_path / name, {**CHOICE, "name": own}, [ROW]) for name, own in (("d.jsonl", "X"), ("e.jsonl", "x"))
    ]
    with pytest.raises(DataError, match="its name 'x' is that of"):
        offline.load_suite(files)
    with pytest.raises(DataError, match="at least one file"):
        offline.load_suite([])


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A tiny LLaVA and three sets, two of them of one dimension."""
    folder = tmp_path_factory.mktemp("suite")
    tiny_conversations(folder, 3)
    save_tiny("llava", folder / "model")
    choice = [{**ROW, "question_id": i, "answer": "AB"[i % 2], "image": f"images/{i % 3}.png"} for i in range(6)]
    yes_no = [{"question_id": i, "text": "Is it?", "answer": ["yes", "no"][i % 2], "pair": i // 2} for i in range(8)]
    text = [{"question_id": i, "text": "What?", "answer": ["red", "blue"], "type": "colour"} for i in range(3)]
    files = [
        write(folder / "a.jsonl", CHOICE, choice),
        write(folder / "b.json", {"name": "Is it", "dimension": "HAL", "kind": "yes-no", "score": "mme"}, yes_no),
        write(folder / "c.jsonl", {"name": "Colours", "dimension": "COM", "kind": "ocr"}, text),
    ]
    return load_model(folder / "model", device="cpu"), Encoder.from_pretrained(folder / "model"), files


def say(monkeypatch, answers):
    """Make the model say these, question after question in the order asked."""
    said = iter(answers)
    monkeypatch.setattr(Encoder, "decode", lambda self, ids: next(said))


def test_a_suite_is_scored_with_means_and_intervals(suite, tmp_path, monkeypatch):
    model, encoder, files = suite
    sets = offline.load_suite(files)
    say(monkeypatch, ["A"] * 6 + ["yes", "no"] * 4 + ["red", "green", "blu"])
    scores = offline.run_suite(model, encoder, sets, tmp_path, max_new_tokens=1, progress=False)
    values = {one.name: one.interval.value for one in scores.sets}
    assert values == {"Animals": 50, "Is it": 100, "Colours": pytest.approx(100 * (1 + 0 + 0.75) / 3)}
    com = (50 + values["Colours"]) / 2
    assert list(scores.dimensions) == ["COM", "HAL"]
    assert scores.dimensions["COM"].value == pytest.approx(com)
    assert scores.kr.value == pytest.approx(sum(values.values()) / 3)
    assert scores.kr.low < scores.kr.value < scores.kr.high
    assert scores.sets[1].interval.low == 100
    # The variance of K.R over draws is that of independent sets.
    widths = [one.interval.high - one.interval.low for one in scores.sets]
    assert scores.kr.high - scores.kr.low < max(widths)
    rows = [json.loads(line) for line in (tmp_path / "animals" / "marked.jsonl").read_text().splitlines()]
    assert rows[1] == {"question_id": "1", "type": "all", "answer": "B", "reply": "A", "read": "A", "mark": 0.0}
    assert offline.load_suite_scores(tmp_path) == scores


def test_sets_are_drawn_independently(tmp_path):
    """The mean of two sets of the same marks is surer than one of them, by about √2."""
    files = [
        write(tmp_path / f"{name}.jsonl", {**CHOICE, "name": name}, [{**ROW, "question_id": i} for i in range(40)])
        for name in ("one", "two")
    ]
    sets = offline.load_suite(files)
    found = [(each, mark(each.kind, each.score, each.items, ["A", "B"] * 20)) for each in sets]
    scores = offline.summarize(found)
    width = scores.sets[0].interval.high - scores.sets[0].interval.low
    assert 0.6 * width < scores.kr.high - scores.kr.low < 0.8 * width


def test_a_stopped_suite_asks_nothing_twice(suite, tmp_path, monkeypatch):
    model, encoder, files = suite
    sets = offline.load_suite(files)
    asked = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, c, **k: asked.append(c.id) or encode(self, c, **k))
    first = offline.run_suite(model, encoder, sets[:1], tmp_path, max_new_tokens=2, progress=False)
    assert len(asked) == 6
    whole = offline.run_suite(model, encoder, sets, tmp_path, max_new_tokens=2, progress=False)
    assert len(asked) == 6 + 8 + 3
    assert whole.sets[0] == first.sets[0]
    assert offline.run_suite(model, encoder, sets, tmp_path, max_new_tokens=2, progress=False) == whole
    assert len(asked) == 17


def test_broken_suite_scores_are_named(tmp_path):
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"suite\.json: cannot be read"):
        offline.load_suite_scores(tmp_path)


def test_every_kind_has_a_prompt_and_a_score():
    assert set(offline.PROMPTS) == set(marks.SCORES)
