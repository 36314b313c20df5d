"""`kore eval --answers`: answers that something else has given are marked and compared like our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kore.artifacts import read_json
from kore.cli.main import main
from kore.errors import DataError
from kore.evaluation import Answer, Measures
from kore.evaluation.given import mark, read_predictions
from kore.evaluation.results import STATE
from kore.evaluation.summary import load_run

ANSWERS = {"n1": "It is a red fox.", "n2": "Paris", "o1": "no"}


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    new = [
        {"question_id": "n1", "text": "Which animal?", "answer": "fox", "type": "animal"},
        {"question_id": "n2", "text": "Where?", "answer": "Rome", "type": "place"},
    ]
    old = [{"question_id": "o1", "text": "Is it?", "answer": "yes", "type": "presence"}]
    said = [{"question_id": name, "prediction": text} for name, text in ANSWERS.items()]
    return {
        "new": write(tmp_path / "new.jsonl", new),
        "old": write(tmp_path / "old.jsonl", old),
        "answers": write(tmp_path / "answers.jsonl", [*said, {"question_id": "unknown", "text": "x"}]),
    }


def test_the_result_is_that_of_a_model_with_these_answers(files, tmp_path, capsys) -> None:
    out = tmp_path / "theirs"
    words = ["eval", "--answers", str(files["answers"]), "-q", str(files["new"]), "--old", str(files["old"])]
    assert main([*words, "-o", str(out)]) == 0
    scores = read_json(out / "scores.json")
    marks = [Measures().mark("It is a red fox.", "fox"), Measures().mark("Paris", "Rome")]
    assert marks[0][0] == 1 and 0 < marks[0][1] < 1 and marks[1] == (0, 0)
    assert scores["ka"] == pytest.approx(100 * (marks[0][0] + marks[0][1]) / 4) and scores["kr"] == 0
    run = load_run(out)
    assert [one.prediction for one in run.new["new"].answers] == ["It is a red fox.", "Paris"]
    assert (out / "report.html").is_file() and "K.A" in capsys.readouterr().out
    assert main([*words, "-o", str(out), "--cem", "squad"]) == 0
    assert read_json(out / "scores.json")["measures"]["cem"] == "squad"
    again = tmp_path / "again"
    assert main([*words, "-o", str(again)]) == 0
    assert main(["eval", "--compare", f"a={out}", f"b={again}", "--cem", "vqa", "-o", str(tmp_path / "c.html")]) == 0


def test_the_form_of_llava_s_scripts_is_read_and_two_answers_to_a_question_are_refused(tmp_path) -> None:
    theirs = write(tmp_path / "a.jsonl", [{"question_id": 7, "prompt": "Which?", "text": "fox", "answer_id": "x"}])
    assert read_predictions([theirs]) == {"7": "fox"}
    other = write(tmp_path / "b.jsonl", [{"question_id": "7", "prediction": "dog"}])
    with pytest.raises(DataError, match=r"b\.jsonl:1.*'7' has another answer before"):
        read_predictions([theirs, other])
    assert read_predictions([theirs, theirs]) == {"7": "fox"}
    for row in ({"question_id": "1"}, {"prediction": "x"}, {"question_id": "1", "prediction": 3}, ["x"]):
        with pytest.raises(DataError, match=r"c\.jsonl:1.*expected \{"):
            read_predictions([write(tmp_path / "c.jsonl", [row])])  # type: ignore[list-item]


def test_a_question_without_an_answer_is_an_error_or_left_out(files, tmp_path) -> None:
    from kore.data import load_questions

    questions = load_questions(files["new"])
    with pytest.raises(DataError, match=r"new\.jsonl:2.*no answer with the question_id 'n2'"):
        mark(questions, {"n1": "fox"})
    result = mark(questions, {"n1": " fox "}, on_missing="skip")
    assert result.answers == [Answer.of(0, questions[0], "fox", Measures())]
    assert [one.question_id for one in result.left_out] == ["n2"]
    with pytest.raises(DataError, match="none of the 2 questions has an answer"):
        mark(questions, {"n3": "fox"}, on_missing="skip")


def test_answers_of_a_model_are_not_written_over_and_options_that_ask_are_refused(files, tmp_path, capsys) -> None:
    words = ["eval", "--answers", str(files["answers"]), "-q", str(files["new"])]
    held = tmp_path / "model" / "new" / "new"
    held.mkdir(parents=True)
    (held / STATE).write_text("{}")
    for more, expected in (
        (["-o", str(tmp_path / "model")], "holds the answers of a model"),
        (["-o", str(tmp_path / "x"), "-m", "model"], "expected --model or --answers"),
        (["-o", str(tmp_path / "x"), "-a", str(tmp_path)], "--adapter: expected --model"),
    ):
        assert main([*words, *more]) != 0
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
