"""``kore retention`` from the command line, and the answers it gives engines."""

from __future__ import annotations

import json
import sys

import pytest

from kore.cli import main
from kore.data.types import Message
from kore.errors import ConfigError, DataError
from kore.retention.answering import Answerer, Prompt
from kore.retention.run import load_retention
from kore.retention.vlmeval_model import prompt_of
from tests.tiny import save_tiny, tiny_conversations, tiny_llava


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny LLaVA, two adapters of it, pictures, and a set of questions."""
    from peft import LoraConfig, get_peft_model

    from kore.models import language_model_linears

    folder = tmp_path_factory.mktemp("cli")
    tiny_conversations(folder, 3)
    save_tiny("llava", folder / "model")
    for number in (1, 2):
        base = tiny_llava(0)
        config = LoraConfig(r=2, target_modules=language_model_linears(base), init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / f"adapter-{number}")
    rows = [{"benchmark": {"name": "Is it", "dimension": "HAL", "kind": "yes-no"}}]
    rows += [{"question_id": i, "text": "Is it?", "answer": ["yes", "no"][i % 2]} for i in range(4)]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prompt(text, images=(), limit=5, stops=()):
    return Prompt(text, (Message("user", text),), lambda: list(images), limit, tuple(stops))


def said(answerer, prompts):
    found: dict[int, str] = {}
    for batch in answerer.answer(prompts):
        found |= batch
    return [found[i] for i in range(len(prompts))]


def test_batches_of_any_prompts_answer_as_single_ones(setting, tmp_path):
    """No image, one, two with and without marks, several turns, several limits; the second time from the journal."""
    from PIL import Image

    files = sorted((setting / "images").glob("*.png"))
    opened = [Image.open(file).convert("RGBA") for file in files]
    prompts = [prompt("Who?"), prompt("What is it?", files[:1]), prompt("Compare <image> with <image>.", opened[:2])]
    prompts += [
        prompt("Compare them.", files[:2]),
        prompt("Long?", limit=9),
        prompt("What is it?", opened[1:2], limit=9),
    ]
    turns = [
        {"role": "user", "content": [{"type": "image", "value": str(files[0])}, {"type": "text", "value": "What?"}]},
        {"role": "assistant", "content": "A square."},
        {
            "role": "user",
            "content": [{"type": "image", "value": str(files[1])}, {"type": "text", "value": "And <image>?"}],
        },
    ]
    prompts.append(prompt_of(turns, "MMDU", 5))
    assert [message.text for message in prompts[-1].messages] == ["<image>\nWhat?", "A square.", "<image>\nAnd ?"]
    model = str(setting / "model")
    journal = tmp_path / "answers.jsonl"
    together = Answerer(model, device="cpu", batch_size=4, journal=str(journal))
    single = Answerer(model, device="cpu")
    first = said(together, prompts)
    assert first == said(single, prompts) and len(set(first)) > 3
    lines = journal.read_text().count("\n")
    again = Answerer(model, device="cpu", batch_size=2, journal=str(journal))
    again.model = None  # nothing is asked
    assert said(again, prompts) == first and lines == len(prompts)
    other = said(Answerer(model, str(setting / "adapter-1"), device="cpu", batch_size=4), prompts)
    assert other != first


def test_stops_end_an_answer_and_limits_hold(setting):
    answerer = Answerer(str(setting / "model"), device="cpu", max_new_tokens=7)
    (whole,) = said(answerer, [prompt("Who founded it?", limit=30)])
    free = Answerer(str(setting / "model"), device="cpu")
    assert said(free, [prompt("Who founded it?", limit=7)]) == [whole]
    assert len(said(free, [prompt("Who founded it?", limit=30)])[0]) > len(whole)
    middle = whole[len(whole) // 2]
    assert said(answerer, [prompt("Who founded it?", limit=30, stops=[middle])]) == [whole.split(middle)[0].strip()]
    answerer._room = 100  # more is asked for than the model has positions
    assert answerer._within(60, 90) == 40 and answerer._within(99, 90) == 32 and answerer._within(10, 90) == 90


def test_what_cannot_be_asked_is_named(setting):
    answerer = Answerer(str(setting / "model"), device="cpu")
    with pytest.raises(DataError, match=r"mme 3: image /no/such\.png: no such file"):
        said(answerer, [Prompt("mme 3", (Message("user", "?"),), lambda: ["/no/such.png"], 3)])
    with pytest.raises(DataError, match="expected images, found dict"):
        said(answerer, [Prompt("x", (Message("user", "?"),), lambda: [{}], 3)])
    with pytest.raises(DataError, match="expected text and images, found 'video'"):
        prompt_of([{"role": "user", "content": [{"type": "video", "value": "a"}]}], "x", 3)
    with pytest.raises(ConfigError, match="batch_size: expected at least 1"):
        Answerer(str(setting / "model"), batch_size=0)


def test_local_sets_of_several_adapters_side_by_side(setting, tmp_path, capsys):
    words = ["retention", "-m", str(setting / "model"), "--suite", str(setting / "set.jsonl"), "-o", str(tmp_path)]
    words += ["-a", str(setting / "adapter-1"), "-a", f"two={setting / 'adapter-2'}", "--device", "cpu"]
    assert main([*words, "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "adapter-1" in out and "two" in out and "local sets, mean with 95 %" in out and "K.R over" not in out
    for name in ("adapter-1", "two"):
        found = load_retention(tmp_path / name)
        assert found.suite.sets[0].count == 4 and found.outcomes == () and found.kr is None


def test_a_dry_run_says_what_is_missing_and_writes_nothing(setting, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = ["retention", "-m", str(setting / "model"), "-o", str(tmp_path / "out"), "--data-root", str(tmp_path)]
    assert (
        main([*words, "--dry-run", "--lmms-python", sys.executable, "--suite", str(setting / "set.jsonl"), "-b", "all"])
        == 0
    )
    out = capsys.readouterr().out
    assert "OCRVQA_TESTCORE.tsv" in out and "Is it" in out and "0 of 12 benchmarks are ready" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "no/such/model"], "--model: no such model directory: no/such/model"),
        (["-m", "a/b", "-a", "/no/adapter"], "--adapter: no such directory: /no/adapter"),
        (["-m", "a/b", "-b", "popes"], "got 'popes'"),
        (["-m", "a/b", "--data-root", "/no/data"], "--data-root: no such directory: /no/data"),
        (["-m", "x=a/b", "-m", "x=c/d"], "two are called 'x'"),
    ],
)
def test_wrong_options_are_named(words, message, tmp_path, capsys):
    assert main(["retention", "-o", str(tmp_path), *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
