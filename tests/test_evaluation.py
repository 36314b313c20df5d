"""Evaluation on a small real LLaVA: batches, marks, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kore.data import Encoder, Question
from kore.errors import ArtifactError, ConfigError, DataError
from kore.evaluation import EvalResult, LeftOut, Measures, Score, evaluate, load_result
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


@pytest.mark.parametrize("change", ["weights", "question", "rounds before", "length"])
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
    elif change == "rounds before":
        again = [questions[0], replace(questions[1], history=(("Is it red?", "yes"),))]
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


def test_answers_of_processes_that_were_killed_are_taken_in(tiny, questions, tmp_path, monkeypatch):
    """What processes 0 and 2 had written, the last line torn, and one line of nonsense."""
    model, encoder, _ = tiny
    whole = evaluate(model, encoder, questions, max_new_tokens=3, output=tmp_path, progress=False)
    files = {name: (tmp_path / name).read_bytes() for name in ("answers.jsonl", "scores.json")}
    lines = files["answers.jsonl"].decode().split("\n")
    (tmp_path / "scores.json").unlink()
    (tmp_path / "answers.jsonl").write_text("\n".join([lines[4], '{"index": "x"}', lines[1][:-9]]))
    (tmp_path / "answers.2.jsonl").write_text("\n".join([lines[0], lines[4], lines[3], ""]))
    asked = []
    encode = type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda self, c, **k: asked.append(c.id) or encode(self, c, **k))
    assert evaluate(model, encoder, questions, max_new_tokens=3, output=tmp_path, progress=False) == whole
    assert sorted(asked) == ["i1", "i2"]
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
    assert not (tmp_path / "answers.2.jsonl").exists()


def test_other_measures_mark_the_kept_answers_anew(tiny, questions, tmp_path, monkeypatch):
    model, encoder, _ = tiny
    monkeypatch.setattr(type(encoder), "decode", lambda self, ids: "one one red")
    asked = [replace(questions[0], answer="1 red")]
    first = evaluate(model, encoder, asked, max_new_tokens=1, output=tmp_path, progress=False)
    assert (first.overall.cem, first.overall.f1) == (100, pytest.approx(40)) and first.measures == Measures()
    monkeypatch.setattr(type(encoder), "encode", None)
    options = {"max_new_tokens": 1, "output": tmp_path, "progress": False}
    second = evaluate(model, encoder, asked, **options, cem="squad", f1="set")
    assert (second.overall.cem, second.overall.f1) == (0, pytest.approx(50))
    assert second == load_result(tmp_path) and second.measures == Measures("squad", "set")
    assert json.loads((tmp_path / "scores.json").read_text())["measures"] == {"cem": "squad", "f1": "set"}
    with pytest.raises(ConfigError, match="f1: expected multiset or set, got 'bag'"):
        evaluate(model, encoder, asked, f1="bag")


def test_scores_come_with_intervals_by_type(tiny, questions, tmp_path, monkeypatch):
    from scipy.stats import binomtest

    model, encoder, _ = tiny
    said = iter(["red", "blue", "red", "no", "mira"])
    monkeypatch.setattr(type(encoder), "decode", lambda self, ids: next(said))
    evaluate(model, encoder, questions, batch_size=5, max_new_tokens=1, output=tmp_path, progress=False)
    scores = json.loads((tmp_path / "scores.json").read_text())
    image = scores["by_type"]["image"]
    wilson = binomtest(2, 4).proportion_ci(method="wilson")
    assert image["count"] == 4 and image["cem"] == 50
    assert image["intervals"]["cem"] == pytest.approx([100 * wilson.low, 100 * wilson.high])
    for score in (scores["overall"], *scores["by_type"].values()):
        for measure, (low, high) in score["intervals"].items():
            assert 0 <= low <= score[measure] + 1e-9 and score[measure] - 1e-9 <= high <= 100
    assert image["intervals"]["f1"] == [0, 100]


def test_a_question_that_cannot_be_asked_is_named_or_left_out(tiny, questions, tmp_path):
    model, encoder, images = tiny
    (tmp_path / "cut.png").write_bytes((images / "0.png").read_bytes()[:60])
    broken = Question("broken", tmp_path / "cut.png", "What?", "red", "image", source="q.jsonl:7")
    long = Question("long", None, "word " * 600, "red", "text", source="q.jsonl:8")
    options = {"max_new_tokens": 2, "output": tmp_path / "out", "progress": False}
    with pytest.raises(DataError, match=r"q\.jsonl:7: image .*cut\.png cannot be decoded .* with skip"):
        evaluate(model, encoder, [*questions, broken], **options)
    with pytest.raises(DataError, match=r"q\.jsonl:8: the prompt has \d{3,} tokens and the answer up to 2, .* 512"):
        evaluate(model, encoder, [*questions, long], **options)
    result = evaluate(model, encoder, [*questions, broken, long], **options, on_bad_question="skip")
    assert result.overall.count == 5 and [one.question_id for one in result.left_out] == ["broken", "long"]
    assert isinstance(result.left_out[0], LeftOut) and "cut.png" in result.left_out[0].reason
    assert load_result(tmp_path / "out") == result
    with pytest.raises(DataError, match=r"no question could be asked; the first problem: q\.jsonl:8"):
        evaluate(model, encoder, [long], progress=False, on_bad_question="skip")


def test_a_prompt_that_the_encoder_would_cut_is_refused(tiny, questions):
    model, encoder, _ = tiny
    short = Encoder(encoder.tokenizer, encoder.vision.image_processor, encoder.model_config, max_length=20)
    with pytest.raises(DataError, match=r"the prompt has \d\d tokens, the encoder's max_length is 20"):
        evaluate(model, short, questions, max_new_tokens=2, progress=False)


def test_a_result_without_measures_was_marked_as_before_there_were_any(tiny, questions, tmp_path):
    model, encoder, _ = tiny
    evaluate(model, encoder, questions, max_new_tokens=1, output=tmp_path, progress=False)
    scores = json.loads((tmp_path / "scores.json").read_text())
    del scores["measures"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert load_result(tmp_path).measures == Measures("squad", "multiset")
