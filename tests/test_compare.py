"""Evaluations compared: the numbers, what is refused, the page, and the command."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kore import metrics, statistics
from kore.cli.main import main
from kore.errors import ArtifactError, DataError
from kore.evaluation import Answer, EvalResult, LeftOut, Measures
from kore.evaluation.comparing import compare, names_for
from kore.evaluation.comparison_page import write_comparison
from kore.evaluation.results import Store
from kore.evaluation.summary import Run, differences, hars_of, load_run, summarize

TYPES = ("person", "place", "year")


def result(rights: list[int], image: Path | None = None) -> EvalResult:
    """Question i is of type i mod 3, answered right where ``rights`` says so, and with half the words elsewhere."""
    answers = []
    for i, right in enumerate(rights):
        prediction = "It is red kite" if right else "a kite"
        marks = Measures().mark(prediction, "red kite")
        answers.append(
            Answer(i, f"q{i}", TYPES[i % 3], image and str(image), f"Who <{i}>?", "red kite", prediction, *marks)
        )
    return EvalResult.of(answers)


def drawn(seed: int, count: int, share: float) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).random(count) < share]


def save(folder: Path, new: EvalResult, old: EvalResult | None = None) -> Path:
    """As ``kore eval`` writes it."""
    sets = {"new": {"fresh": new}, "old": {} if old is None else {"digits": old}}
    for group, results in sets.items():
        for name, one in results.items():
            store = Store(folder / group / name)
            store.open({}, len(one.answers))
            store.finish(one)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({group: dict.fromkeys(each) for group, each in sets.items()}))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Evaluations of 60 new and 30 old questions: b is better than a on the new and worse on the old."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("compare")
    Image.effect_noise((300, 200), 60).convert("RGB").save(folder / "noise.png")
    for name, seed, new, old in (("a", 1, 0.3, 0.9), ("b", 2, 0.8, 0.5), ("before", 3, 0.1, 0.95)):
        save(folder / name, result(drawn(seed, 60, new), folder / "noise.png"), result(drawn(seed + 9, 30, old)))
    return folder


@pytest.fixture
def two(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "two"))


def test_hars_of_arrays_is_that_of_numbers():
    scores = [(7.12, 46.74), (5.0, 46.74), (50.0, 0.0), (0.0, 10.0), (20.0, 60.0)]
    befores = [(7.12, 46.74), (10.0, 50.0), (0.0, 50.0), (10.0, 0.0), (0.0, 0.0)]
    for before in befores:
        found = hars_of(*(np.array(each) for each in zip(*scores)), *before)
        assert found == pytest.approx([metrics.hars(*score, *before) for score in scores], rel=1e-12)


def test_the_summary_of_one_run_is_the_bootstrap_over_questions(two):
    run, before = load_run(two / "a"), load_run(two / "before")
    found = summarize([run], [before])
    new, old, new0, old0 = (each for one in (run, before) for each in (one.new["fresh"], one.old["digits"]))
    assert found["K.A"].value == pytest.approx(new.overall.mean) and found["K.R"].value == pytest.approx(
        old.overall.cem
    )
    assert found["Avg"].value == pytest.approx(metrics.average(new.overall.mean, old.overall.cem))
    expected = metrics.hars(new.overall.mean, old.overall.cem, new0.overall.mean, old0.overall.cem)
    assert found["HARS"].value == pytest.approx(expected)
    alone = statistics.bootstrap_interval([100 * answer.mean for answer in new.answers])
    assert (found["K.A"].low, found["K.A"].high) == pytest.approx((alone.low, alone.high), abs=1.5)
    widths = {name: one.high - one.low for name, one in found.items()}
    both = np.hypot(widths["K.A"], widths["K.R"]) / 2
    assert widths["Avg"] == pytest.approx(both, rel=0.08)
    assert list(summarize([run])) == ["K.A", "K.R", "Avg"] and list(summarize([Run(new=run.new)])) == ["K.A"]


def test_the_summary_of_seeds(two):
    """Bare scores know only seeds: Student's t. Answers add the noise of questions."""
    runs = [Run(new={"x": ka}, old={"m": kr, "n": kr + 10}) for ka, kr in ((30.0, 50.0), (36.0, 46.0), (33.0, 54.0))]
    found = summarize(runs, [Run(new={"x": 10.0}, old={"m": 60.0, "n": 70.0})], over="seeds")
    assert found["K.A"] == statistics.seed_interval([30.0, 36.0, 33.0])
    assert found["K.R"] == statistics.seed_interval([55.0, 51.0, 59.0])
    scores = [metrics.hars(ka, kr + 5, 10.0, 65.0) for ka, kr in ((30.0, 50.0), (36.0, 46.0), (33.0, 54.0))]
    expected = statistics.seed_interval(scores)
    assert found["HARS"].as_json() == pytest.approx(expected.as_json())
    both = summarize(runs, resamples=100_000)
    assert (both["K.A"].low, both["K.A"].high) == pytest.approx((found["K.A"].low, found["K.A"].high), rel=0.05)
    assert summarize(runs[:1])["K.A"] == statistics.Interval(30.0)
    several = [Run(new={"x": result(drawn(seed, 60, 0.5))}) for seed in range(3)]
    widths = {}
    for over in ("questions", "seeds", "both"):
        one = summarize(several, over=over)["K.A"]
        widths[over] = one.high - one.low
    assert max(widths["questions"], widths["seeds"]) < widths["both"]


def test_runs_with_other_questions_are_drawn_apart():
    same = [Run(new={"x": result(drawn(1, 60, 0.5))})] * 2
    other = [Run(new={"x": result(drawn(1, 60, 0.5))}), Run(new={"x": renamed(result(drawn(1, 60, 0.5)))})]
    width = {}
    for name, runs in (("same", same), ("other", other)):
        one = summarize(runs, over="questions")["K.A"]
        width[name] = one.high - one.low
    assert width["other"] == pytest.approx(width["same"] / np.sqrt(2), rel=0.1)


def renamed(one: EvalResult) -> EvalResult:
    return EvalResult.of([replace(answer, question_id=f"other-{answer.question_id}") for answer in one.answers])


def test_differences_of_measures_are_paired_by_question():
    base = drawn(0, 80, 0.5)
    better = [max(one, int(i % 10 == 0)) for i, one in enumerate(base)]
    a, b = Run(new={"x": result(base)}), Run(new={"x": result(better)})
    found = differences([a], [b])["K.A"]
    alone = summarize([a])["K.A"]
    assert found.difference.value == pytest.approx(b.new["x"].overall.mean - a.new["x"].overall.mean) and found.p < 0.1
    assert found.difference.high - found.difference.low < 0.6 * (alone.high - alone.low)
    assert differences([a], [a])["K.A"].p is None
    worlds = [[Run(new={"x": ka + gain}) for ka in (20.0, 40.0, 60.0)] for gain in (0.0, 5.0)]
    apart, pairs = differences(*worlds)["K.A"], differences(*worlds, paired=True)["K.A"]
    assert apart.p > 0.5 and pairs.difference == statistics.Interval(5.0)
    with pytest.raises(DataError, match="as many of both, got 3 and 2"):
        differences(worlds[0], worlds[1][:2], paired=True)
    with pytest.raises(DataError, match="different new sets, x and y"):
        differences([a], [Run(new={"y": 1.0})])


def test_a_comparison_has_scores_differences_and_tests(two):
    found = compare({"a": [two / "a"], "b": [two / "b"]}, [two / "before"])
    assert [(line.group, line.type) for line in found.lines] == [
        (group, kind) for group in ("new", "old") for kind in ("all", *TYPES)
    ]
    a, b = (load_run(two / name).new["fresh"] for name in "ab")
    line = found.lines[0]
    assert line.count == 60 and line.scores["a"]["cem"].value == pytest.approx(a.overall.cem)
    assert line.against["b"]["cem"].interval.value == pytest.approx(b.overall.cem - a.overall.cem)
    marks = [[answer.cem for answer in one.answers] for one in (a, b)]
    assert line.against["b"]["cem"].p == statistics.mcnemar(*marks)
    means = [[answer.mean for answer in one.answers] for one in (a, b)]
    assert line.against["b"]["mean"].p == statistics.sign_flip_p(np.subtract(*means[::-1]))
    types = found.lines[1:4]
    assert [one.count for one in types] == [20, 20, 20] and line.against["b"]["cem"].p_holm is None
    assert [one.against["b"]["cem"].p_holm for one in types] == statistics.holm(
        [one.against["b"]["cem"].p for one in types]
    )
    assert set(found.summary["a"]) == set(found.against["b"]) == {"K.A", "K.R", "Avg", "HARS"}
    assert found.against["b"]["K.A"].interval.low > 0 > found.against["b"]["K.R"].interval.high
    assert found.reference == "a" and found.left_out == 0
    assert compare({"a": [two / "a"], "b": [two / "b"]}, [two / "before"]).as_json() == found.as_json()


def test_seeds_of_one_name_widen_the_intervals(two):
    one = compare({"a": [two / "a"], "b": [two / "b"]})
    several = compare({"a": [two / "a"], "b": [two / "b", two / "before"]})
    mean = (one.lines[0].scores["b"]["cem"].value + load_run(two / "before").new["fresh"].overall.cem) / 2
    assert several.lines[0].scores["b"]["cem"].value == pytest.approx(mean)
    width = [each.lines[0].against["b"]["cem"].interval for each in (one, several)]
    assert width[1].high - width[1].low > 3 * (width[0].high - width[0].low)
    assert several.lines[0].against["b"]["cem"].p > one.lines[0].against["b"]["cem"].p


def test_other_questions_are_refused_or_left_out(two):
    whole = load_run(two / "b")
    fewer = EvalResult.of([replace(one, index=i) for i, one in enumerate(whole.new["fresh"].answers[5:])])
    save(two / "c", fewer, whole.old["digits"])
    contenders = {"a": [two / "a"], "c": [two / "c"]}
    with pytest.raises(
        DataError, match=r"in new/fresh: 'q0' was asked of a and not of c \(60 and 55 questions\); --sh"
    ):
        compare(contenders)
    found = compare(contenders, shared=True)
    assert found.lines[0].count == 55 and found.left_out == 5
    assert found.runs["a"][0].new["fresh"].answers[0].question_id == "q5"
    changed = [replace(one, question="Why?") for one in whole.new["fresh"].answers]
    save(two / "d", EvalResult.of(changed), whole.old["digits"])
    with pytest.raises(
        DataError, match=r"question 'q0' of new/fresh is not the same in a and d: 'Who <0>\?' .*'Why\?'"
    ):
        compare({"a": [two / "a"], "d": [two / "d"]}, shared=True)
    save(two / "e", whole.new["fresh"])
    with pytest.raises(DataError, match="a has the sets new/fresh, old/digits, e has new/fresh; --shared"):
        compare({"a": [two / "a"], "e": [two / "e"]})
    assert {line.group for line in compare({"a": [two / "a"], "e": [two / "e"]}, shared=True).lines} == {"new"}
    with pytest.raises(DataError, match="no question of new/fresh in common"):
        compare({"a": [Run(new={"fresh": whole.new["fresh"]})], "b": [Run(new={"fresh": renamed(fewer)})]}, shared=True)


def test_what_is_no_result_is_named(two, tmp_path):
    with pytest.raises(ArtifactError, match=r"gone/scores\.json: no such file"):
        load_run(tmp_path / "gone")
    save(tmp_path / "run" / "eval" / "after", result([1, 0]))
    with pytest.raises(ArtifactError, match="a whole run; its evaluations are eval/before and eval/after"):
        load_run(tmp_path / "run")
    (two / "a" / "scores.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not written by kore eval"):
        load_run(two / "a")
    assert list(load_run(two / "b" / "new" / "fresh").new) == ["questions"]
    with pytest.raises(DataError, match="new set 'x' is a bare score"):
        compare({"a": [Run(new={"x": 3.0})]})


def test_answers_are_marked_alike(two):
    set_f1 = EvalResult.of(
        [replace(one, prediction="kite kite kite") for one in load_run(two / "a").new["fresh"].answers],
        Measures("squad", "set"),
    ).marked(Measures("squad", "multiset"))
    save(two / "s", set_f1.marked(Measures("vqa", "set")))
    save(two / "m", set_f1)
    found = compare({"s": [two / "s"], "m": [two / "m"]})
    assert found.measures == Measures("vqa", "set")
    assert found.lines[0].scores["m"]["f1"].value == pytest.approx(100 * 2 / 3)
    again = compare({"s": [two / "s"]}, measures=Measures())
    assert again.lines[0].scores["s"]["f1"].value == pytest.approx(100 * 2 / 5)


class Page(HTMLParser):
    """Tags, what they refer to, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text.append(data.strip())


def test_the_page_stands_alone_and_shows_where_they_differ(two):
    found = compare({"a": [two / "a"], "<b>": [two / "b"]}, [two / "before"])
    path = write_comparison(found, two / "out" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 2 and "script" not in page.tags and "&lt;b&gt;" in text
    assert all(one.startswith(("#", "data:image/jpeg;base64,")) for one in page.references)
    assert sum(one.startswith("data:") for one in page.references) == page.tags.count("img") > 8
    assert "HARS" in page.text and any("do better than a" in one for one in page.text)
    better = [
        one.question_id
        for one, two_ in zip(*(each[0].new["fresh"].answers for each in found.runs.values()))
        if two_.mean > one.mean
    ]
    shown = [part.rpartition(" ")[2] for part in page.text if re.fullmatch(r"(person|place|year) · q\d+", part)]
    assert shown[:8] and set(shown[:8]) <= set(better) and len({one for one in page.text if " · q" in one}) > 8
    assert json.loads((two / "out" / "compare.json").read_text())["reference"] == "a"
    rows = list(csv.DictReader((two / "out" / "compare.csv").open()))
    assert len(rows) == 2 * 8 * 3 + 2 * 4
    first = next(row for row in rows if row["name"] == "<b>" and row["measure"] == "cem")
    expected = found.lines[0].against["<b>"]["cem"]
    assert float(first["difference"]) == expected.interval.value and float(first["p"]) == expected.p


def test_the_largest_differences_come_first(tmp_path):
    worse, better = ([replace(one, type="t") for one in result([right] * 30).answers] for right in (0, 1))
    answers = list(better)
    answers[17] = replace(answers[17], prediction="red kite", f1=1.0)
    found = compare({name: [Run(new={"x": EvalResult.of(each)})] for name, each in (("a", worse), ("b", answers))})
    page = Page(write_comparison(found, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [part for part in page.text if part.startswith("t · ")][:3] == ["t · q17", "t · q0", "t · q1"]
    assert not any("do worse than" in part for part in page.text)


def test_one_evaluation_has_a_page_too(two):
    left = replace(load_run(two / "a").new["fresh"], left_out=[LeftOut("q99", "no picture")])
    found = compare({"a": [Run(new={"fresh": left})]})
    page = Page(write_comparison(found, two / "report.html").read_text(encoding="utf-8"))
    assert "K.A" in page.text and any("Could not be asked: q99" in one for one in page.text)
    assert any("evenly spaced" in one for one in page.text) and not any("McNemar" in one for one in page.text)


def test_names_are_what_differs_between_paths():
    assert names_for([Path("/x/runs/a/eval"), Path("/x/runs/b/c/eval")]) == ["a", "b/c"]
    assert names_for([Path("/x/runs/a")]) == ["a"] and names_for([Path("/x/a/e"), Path("/x/e")]) == ["a/e", "e"]


def run(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["eval", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_compares(two, capsys):
    status, said = run(
        capsys, "--compare", f"lora={two}/a", two / "b", "--untouched", two / "before", "-o", two / "out"
    )
    assert status == 0 and "b − lora" in said and "HARS" in said and (two / "out" / "report.html").is_file()
    status, said = run(capsys, "--compare", f"k={two}/a", f"k={two}/b", "--f1", "set", "-o", two / "page.html")
    data = json.loads((two / "compare.json").read_text())
    assert status == 0 and data["runs"] == {"k": 2} and data["measures"] == {"cem": "vqa", "f1": "set"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--compare", "-o", "x"], "--compare: expected directories"),
        (["--compare", "A"], "--compare: expected directories"),
        (["--compare", "A", "A", "-o", "x"], "is given twice"),
        (["--compare", "=A", "-o", "x"], "expected DIR or NAME=DIR, got '=a'"),
        (["--compare", "A", "-m", "model", "-o", "x"], "--model: not with --compare"),
        (["A", "-m", "model", "-o", "x"], "directories: expected --compare"),
        (["-m", "model", "-o", "x"], "expected --model or --answers, --output, and --questions or --old"),
        (["--shared", "-m", "model", "-o", "x"], "--shared: expected --compare"),
        (["--compare", "A", "--f1", "bag", "-o", "x"], "f1: expected multiset or set, got 'bag'"),
    ],
)
def test_wrong_words_are_refused(two, capsys, words, expected, monkeypatch):
    monkeypatch.chdir(two)
    status, said = run(capsys, *("a" if word == "A" else "=a" if word == "=A" else word for word in words))
    assert status == 2 and expected in said


@pytest.mark.slow
def test_other_measures_and_a_stopped_command_ask_nothing_again(tmp_path, capsys, monkeypatch):
    from kore.data import Encoder
    from tests.tiny import save_tiny

    save_tiny("llama", tmp_path / "model")
    for name in ("new", "old"):
        rows = [{"question_id": i, "text": f"Who is {i}?", "answer": "red", "type": f"t{i % 2}"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["-m", tmp_path / "model", "-q", tmp_path / "new.jsonl", "--old", tmp_path / "old.jsonl", "--device", "cpu"]
    words += ["-o", tmp_path / "out", "--max-new-tokens", 2]
    status, said = run(capsys, *words)
    assert status == 0 and re.search(r"K\.A 0\.00\nK\.R 0\.00", said) and "t1" in said
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["measures"] == {"cem": "vqa", "f1": "multiset"} and scores["intervals"] == {
        "ka": [None, None],
        "kr": [None, None],
    }
    monkeypatch.setattr(Encoder, "encode", None)
    status, said = run(capsys, *words, "--f1", "set", "--cem", "evoke")
    assert status == 0, said
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["measures"] == {"cem": "evoke", "f1": "set"}
    status, said = run(capsys, *words, "--f1", "set", "--cem", "evoke")
    assert status == 0 and "skipped" in said
