"""Evaluation on a small real LLaVA: batches, marks, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kore.data import Encoder, Question
from kore.errors import ArtifactError, DataError
from kore.evaluation import EvalResult, Score, evaluate, load_result
from kore.models import language_model_linears, load_model
from tests.tiny import save_tiny, tiny_conversations


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llava", folder / "model")
    tiny_conversations(folder, 4)
    return load_model(folder / "model", device="cpu"), Encoder.from_pretrained(folder / "model"), folder / "images"


@pytest.fixture
def questions(tiny):
    return ask(tiny[2])


def ask(images):
    texts = ["What is it?", "What is the colour of the square in this picture?", "Who?", "Describe it."]
    asked = [Question(f"i{i}", images / f"{i}.png", text, "red", "image") for i, text in enumerate(texts)]
    return [*asked, Question("t0", None, "Who founded Arven, and in which year?", "Mira Solt", "text")]


def predictions(result):
    return [answer.prediction for answer in result.answers]


@pytest.mark.parametrize("kind", ["llava", "qwen_vl", "llama"])
def test_the_batch_size_changes_no_answer(tiny, kind, tmp_path):
    model, encoder, images = tiny
    if kind != "llava":
        save_tiny(kind, tmp_path)
        model, encoder = load_model(tmp_path, device="cpu"), Encoder.from_pretrained(tmp_path)
    questions = [replace(one, image=None if kind == "llama" else one.image) for one in ask(images)]
    one = evaluate(model, encoder, questions, batch_size=1, max_new_tokens=5, progress=False)
    all_at_once = evaluate(model, encoder, questions, batch_size=5, max_new_tokens=5, progress=False)
    assert predictions(one) == predictions(all_at_once)
    assert [answer.question_id for answer in one.answers] == [question.question_id for question in questions]
    assert len(set(predictions(one))) > 1


def test_answers_equal_plain_greedy_decoding(tiny, questions):
    model, encoder, _ = tiny
    answer = evaluate(model, encoder, questions[:1], max_new_tokens=4, progress=False).answers[0]
    batch = encoder.collate([encoder.encode(questions[0].conversation(), part="prompt")])
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert answer.prediction == encoder.decode(ids[0, -4:]).strip()


def test_marks_and_means(tiny, questions, monkeypatch):
    model, encoder, _ = tiny
    said = iter(["It is red.", "blue", "red", "no", "mira"])
    monkeypatch.setattr(type(encoder), "decode", lambda self, ids: next(said))
    result = evaluate(model, encoder, questions, batch_size=5, max_new_tokens=1, progress=False)
    by_id = {answer.question_id: answer for answer in result.answers}
    # Batches go by image and length of the text, so "said" is in that order.
    assert sorted((a.cem, round(a.f1, 3)) for a in by_id.values()) == [(0, 0), (0, 0), (0, 0.667), (1, 0.5), (1, 1)]
    assert result.overall == Score(5, 40.0, pytest.approx(100 * (0.5 + 1 + 2 / 3) / 5))
    assert result.by_type["image"].count == 4 and result.by_type["text"].cem == 0
    assert result.overall.mean == pytest.approx((result.overall.cem + result.overall.f1) / 2)


def test_a_stopped_evaluation_goes_on(tiny, questions, tmp_path, monkeypatch):
    model, encoder, _ = tiny
    whole = evaluate(model, encoder, questions, batch_size=2, max_new_tokens=3, output=tmp_path / "a", progress=False)
    lines = (tmp_path / "a" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    stopped = tmp_path / "a"
    (stopped / "scores.json").unlink()
    (stopped / "answers.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]), encoding="utf-8")
    asked = []
    encode = type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda self, c, **k: asked.append(c.id) or encode(self, c, **k))
    again = evaluate(model, encoder, questions, batch_size=2, max_new_tokens=3, output=stopped, progress=False)
    assert len(asked) == 2
    assert again == whole == load_result(stopped)
    assert json.loads((stopped / "scores.json").read_text())["overall"]["count"] == 5


@pytest.mark.parametrize("change", ["weights", "question", "length"])
def test_answers_of_another_model_or_question_are_not_kept(tiny, questions, tmp_path, change, monkeypatch):
    model, encoder, _ = tiny
    evaluate(model, encoder, questions[:2], max_new_tokens=2, output=tmp_path, progress=False)
    asked = []
    encode = type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda self, c, **k: asked.append(c.id) or encode(self, c, **k))
    again, tokens = questions[:2], 2
    parameter = model.get_submodule(language_model_linears(model)[0]).weight
    before = parameter.detach().clone()
    if change == "weights":
        parameter.data.add_(0.5)
    elif change == "question":
        again = [questions[0], replace(questions[1], answer="blue")]
    else:
        tokens = 3
    evaluate(model, encoder, again, max_new_tokens=tokens, output=tmp_path, progress=False)
    parameter.data.copy_(before)
    assert len(asked) == 2


def test_training_mode_is_restored_and_questions_are_checked(tiny, questions):
    model, encoder, _ = tiny
    model.train()
    evaluate(model, encoder, questions[:1], max_new_tokens=1, progress=False)
    assert model.training
    model.eval()
    with pytest.raises(DataError, match="at least one question"):
        evaluate(model, encoder, [])
    with pytest.raises(DataError, match="two questions have the question_id 'i0'"):
        evaluate(model, encoder, [questions[0], questions[0]])


def test_a_broken_result_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"scores\.json: no such file"):
        load_result(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "answers.jsonl").write_text("nonsense\n")
    with pytest.raises(ArtifactError, match=r"answers\.jsonl: cannot be read"):
        load_result(tmp_path)


def test_a_line_separator_inside_an_answer_stays_inside(tiny, questions, tmp_path, monkeypatch):
    model, encoder, _ = tiny
    monkeypatch.setattr(type(encoder), "decode", lambda self, ids: "one\u2028two")
    result = evaluate(model, encoder, questions[:1], max_new_tokens=1, output=tmp_path, progress=False)
    assert isinstance(result, EvalResult) and load_result(tmp_path) == result
