"""``kore augment`` on the command line."""

from __future__ import annotations

import json

import pytest

from kore.cli import main
from kore.data import load_conversations
from tests.augment_knowledge import write_knowledge
from tests.augment_server import Fault, ScriptedServer
from tests.test_augment_run import Talkative, files_of
from tests.test_cli import fails


@pytest.fixture
def knowledge(tmp_path):
    return write_knowledge(tmp_path / "data" / "knowledge.jsonl", 4)


def test_from_knowledge_to_data_that_kore_trains_on(knowledge, tmp_path, capsys):
    words = ["augment", str(knowledge), "-o", str(tmp_path / "out"), "--export", "sharegpt,openai"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for text in ("dialogue", "4 items, 4 images", f"result: {tmp_path}/out/llava.json", "quality.html"):
        assert text in shown
    rows = load_conversations(tmp_path / "out" / "llava.json")
    assert {row.id.partition("-")[2].split("-")[1] for row in rows} == {"dialogue", "recognition", "caption", "vqa"}
    before = files_of(tmp_path / "out")
    assert main(words) == 0
    assert "(4 of them done before)" in capsys.readouterr().out and files_of(tmp_path / "out") == before


def test_a_dry_run_says_what_it_would_cost(knowledge, tmp_path, capsys):
    with ScriptedServer(Talkative(knowledge)) as server:
        words = ["augment", str(knowledge), "-o", str(tmp_path / "out"), "-m", "scripted", "--base-url", server.url]
        words += ["--set", "generator.price_input=1000", "--set", "generator.price_output=1000", "--dry-run"]
        assert main(words) == 0
        assert not server.requests
    shown = capsys.readouterr().out
    assert "4 items, 0 of them done; nothing was asked or written" in shown and "requests: 12," in shown
    assert float(shown.partition("cost: ")[2].split()[0]) > 1 and not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_key_and_opens_no_client(knowledge, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai.OpenAI", lambda **_: pytest.fail("a client"))
    words = ["augment", str(knowledge), "-o", str(tmp_path / "out"), "-m", "gpt-5", "--dry-run"]
    assert main([*words, "--set", "generator.extra.reasoning_effort=low"]) == 0
    assert "requests: 12, of which the cache answers 0" in capsys.readouterr().out


def test_one_of_a_thing_is_no_plural(tmp_path, capsys):
    knowledge = write_knowledge(tmp_path / "data" / "knowledge.jsonl", 1)
    with knowledge.open("a") as file:
        file.write("{}\n")
    words = ["augment", str(knowledge), "-o", str(tmp_path / "out"), "--on-bad-row", "skip"]
    assert main([*words, "--set", "quality=false"]) == 0
    shown = "".join(capsys.readouterr())
    assert "1 item, 1 image in" in shown and "left out: 1 bad row\n" in shown and "1 bad row left out; " in shown
    assert "1 bad rows" not in shown


def test_a_service_that_did_not_answer_is_said_to_be_tried_again(knowledge, tmp_path, capsys):
    faults = {number: Fault(status=503) for number in range(3)}
    with ScriptedServer(Talkative(knowledge), faults, key=None) as server:
        words = ["augment", str(knowledge), "-o", str(tmp_path / "out"), "-m", "x", "--base-url", server.url]
        words += ["--set", "limits.retries=2", "--set", "limits.backoff=0.01", "--set", "quality=false"]
        words += ["--set", "limits.stop_after=9", "--workers", "1", "--tasks", "dialogue"]
        assert main(words) == 0
        assert "1 failure may pass: the same command tries these items again" in capsys.readouterr().out
        assert main(words) == 0
        assert "4 items (3 of them done before)" in capsys.readouterr().out and len(server.requests) == 7


def test_a_dry_run_without_a_model(knowledge, tmp_path, capsys):
    for more in ([], ["--general", "image-aware"]):
        assert main(["augment", str(knowledge), "-o", str(tmp_path / "out"), *more, "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert "requests: 0," in shown and "cost: 0.00" in shown and "note: no language model is asked" in shown


@pytest.mark.parametrize("method", ["text-agnostic", "image-agnostic"])
def test_general_augmentation_is_exact_too(method, knowledge, tmp_path):
    common = ["augment", str(knowledge), "--general", method, "--set", "general_samples=3", "--set", "quality=false"]
    for workers in ("1", "4"):
        assert main([*common, "-o", str(tmp_path / workers), "--workers", workers]) == 0
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")
    assert len(json.loads((tmp_path / "1" / "llava.json").read_text())) == 12


def test_mistakes_are_one_clear_line(knowledge, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    common = ["augment", knowledge, "-o", tmp_path / "out"]
    for words, message in (
        (["--set", "generator.kid=x"], "unknown key generator.kid; did you mean generator.kind?"),
        (["--tasks", "dialog"], "tasks"),
        (["-g", "openai"], "kind openai needs the name the server knows"),
        (["--set", "generator.model=x"], "kind rules uses none; set kind to openai or local"),
        (["-m", "gpt"], "OPENAI_API_KEY"),
        (["--images", "commons"], "contact"),
        (["--images", str(tmp_path / "none")], "none"),
        (["--general", "mixup"], "expected one of text-aware, text-agnostic"),
        (["--set", "columns.headline=title"], "knowledge has no column 'headline'"),
        (["--export", "csv"], "export"),
        (["--set", "rounds=11"], "rounds: "),
        (["--texts", str(tmp_path / "texts")], "texts"),
        (["--set", "image_root=nowhere"], "nowhere"),
    ):
        assert message in fails(capsys, [*common, *words]), words
    assert not (tmp_path / "out" / "llava.json").exists()
    assert "no such knowledge file" in fails(capsys, ["augment", tmp_path / "x.jsonl", "-o", tmp_path / "o"])


def test_no_message_repeats_a_key_that_stands_in_the_wrong_place(knowledge, tmp_path, capsys):
    common = ["augment", knowledge, "-o", tmp_path / "out", "-m", "x"]
    for setting in (
        "generator.api_key_env=sk-secret-123",
        "generator.base_url=http://me:sk-secret-123@localhost/v1",
        "generator.base_url=http://localhost/v1?key=sk-secret-123",
    ):
        assert "sk-secret-123" not in fails(capsys, [*common, "--set", setting])
