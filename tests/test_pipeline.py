"""The stage engine, and whole runs on small real models."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kore.errors import ArtifactError, KoreError
from kore.pipeline.loading import load_config
from kore.pipeline.run import run_pipeline, stage_names
from kore.pipeline.stage import duration, model_identity, only_one, record_file, run_stages
from tests.tiny import save_tiny, tiny_conversations


@dataclass
class Step:
    """A stage that writes its setting into a file."""

    output: Path
    setting: Any = 1
    reads: Path | None = None
    name: str = "step"
    fails: bool = False
    ran: list[str] = field(default_factory=list)

    def inputs(self):
        upstream = {"upstream": (self.reads / "result").read_text()} if self.reads else {}
        return {"setting": self.setting, **upstream}

    def complete(self):
        return (self.output / "result").is_file()

    def check(self, context):
        if self.setting == "wrong":
            raise KoreError("a wrong setting")

    def run(self, context):
        self.ran.append("left" if (self.output / "part").exists() else "fresh")
        self.output.mkdir(exist_ok=True)
        (self.output / "part").touch()
        if self.fails:
            raise KoreError("stopped")
        (self.output / "result").write_text(str(self.setting))
        return "fine"


class Said(list):
    def __call__(self, *words):
        self.append(words)


def go(*stages, **options):
    said = Said()
    run_stages(stages, None, said, **options)
    return said


def test_a_done_stage_is_skipped_and_a_changed_one_starts_from_nothing(tmp_path):
    step = Step(tmp_path / "a")
    assert go(step)[-1][:2] == ("step", "done")
    assert go(step) == [("step", "skipped", "already done: fine")]
    changed = Step(tmp_path / "a", setting=2)
    said = go(changed)
    assert said[0] == ("step", "runs", "again, setting is now 2, was 1") and changed.ran == ["fresh"]
    assert go(step, rerun=["step"])[0][2] == "again, as asked" and step.ran[-1] == "fresh"


def test_a_stopped_stage_goes_on_only_under_the_same_key(tmp_path):
    step = Step(tmp_path / "a", fails=True)
    with pytest.raises(KoreError):
        go(step)
    step.fails = False
    assert go(step)[0] == ("step", "runs", "goes on where it was stopped")
    assert step.ran == ["fresh", "left"]
    other = Step(tmp_path / "a", setting=2, fails=True)
    with pytest.raises(KoreError):
        go(other)
    again = Step(tmp_path / "a", setting=3)
    go(again)
    assert again.ran == ["fresh"]


def test_a_mistake_in_the_last_stage_shows_before_the_first_runs(tmp_path):
    first, last = Step(tmp_path / "a", name="first"), Step(tmp_path / "b", setting="wrong", name="last")
    with pytest.raises(KoreError, match="a wrong setting"):
        go(first, last)
    assert not first.ran and not last.ran


def test_a_lost_result_is_made_again(tmp_path):
    step = Step(tmp_path / "a")
    go(step)
    (tmp_path / "a" / "result").unlink()
    assert go(step)[0][2] == "again, its result is not as asked"
    record_file(step.output).write_text("{broken")
    with pytest.raises(ArtifactError, match="no record of how it was made"):
        go(step)


def test_a_directory_that_no_stage_made_is_never_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").touch()
    step = Step(tmp_path / "a")
    with pytest.raises(ArtifactError, match="delete it or choose another output"):
        go(step)
    assert (tmp_path / "a" / "precious").exists() and not step.ran


def test_later_stages_follow_a_changed_result_and_only_then(tmp_path):
    first, second = Step(tmp_path / "a", name="first"), Step(tmp_path / "b", reads=tmp_path / "a", name="second")
    go(first, second)
    said = go(first, second, rerun=["first"])
    assert [words[:2] for words in said] == [("first", "runs"), ("first", "done"), ("second", "skipped")]
    first.setting = 5
    assert ("second", "runs", "again, upstream is now '5', was '1'") in go(first, second)
    with pytest.raises(KoreError, match="no stage is named 'third'; the stages here are first, second"):
        go(first, second, rerun=["third"])


def test_one_process_at_a_time(tmp_path):
    with only_one(tmp_path), pytest.raises(ArtifactError, match="another process is working here"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_model_identity_tells_weights_apart_wherever_they_lie(tmp_path):
    save_tiny("llama", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert model_identity(str(tmp_path / "a")) == model_identity(str(tmp_path / "b"))
    save_tiny("llama", tmp_path / "b", seed=1)
    assert model_identity(str(tmp_path / "a")) != model_identity(str(tmp_path / "b"))
    assert model_identity("owner/name") == "owner/name"


def test_durations_read_well():
    assert [duration(s) for s in (0.42, 12.3, 185, 7800)] == ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]


def write_run(folder: Path, kind: str, **changes: Any) -> Path:
    """A small model, data and configuration, as a user has them."""
    save_tiny(kind, folder / "model")
    text_only = kind == "llama"
    tiny_conversations(folder / "data", 6, text_only=text_only)
    questions = [
        {"question_id": f"q{i}", "text": "What is the colour of the square?", "answer": "red", "type": f"kind {i % 2}"}
        | ({} if text_only else {"image": f"images/{i}.png"})
        for i in range(3)
    ]
    (folder / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    data = {"files": "data/conversations.json", "image_root": None if text_only else "data/images"}
    config = {
        "output_dir": "run",
        "model": {"path": "model", "device": "cpu"},
        "old": data,
        "adapter": {"rank": 4},
        "new": data,
        "train": {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2},
        "eval": {
            "new": [{"name": "fresh", "file": "data/questions.jsonl"}],
            "old": [{"name": "known", "file": "data/questions.jsonl"}],
            "max_new_tokens": 3,
        },
    }
    config["train"]["report_to"] = "none"
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


@pytest.mark.parametrize("kind", ["llava", "qwen_vl", "llama"])
def test_from_yaml_to_report(kind, tmp_path):
    config = load_config(write_run(tmp_path, kind))
    said = Said()
    report = run_pipeline(config, said, progress=False)
    assert [name for name, state, _ in said if state == "done"] == stage_names(config)
    text = report.read_text(encoding="utf-8")
    shown = ("KORE on model", "HARS", "Sample answers", "random directions", "‖W0 x‖", "Whole configuration", "kind 1")
    for words in shown:
        assert words in text
    scores = json.loads((tmp_path / "run" / "eval" / "after" / "scores.json").read_text())
    assert scores["new"]["fresh"]["overall"]["count"] == 3 and scores["kr"] is not None
    assert load_config(tmp_path / "run" / "config.yaml") == config
    said.clear()
    run_pipeline(config, said, progress=False)
    assert {state for _, state, _ in said} == {"skipped"}
    assert adapter_gives_the_trained_logits(tmp_path, kind)


def adapter_gives_the_trained_logits(folder: Path, kind: str) -> bool:
    """The exported adapter in stock PEFT on the untouched base answers as the merged model does."""
    from peft import PeftModel

    from kore.merging import merge
    from kore.models import load_model

    merge(folder / "model", folder / "run" / "train" / "adapter", folder / "merged")
    ids = torch.tensor([[20, 33, 47, 61]])
    base, merged = load_model(folder / "model", device="cpu"), load_model(folder / "merged", device="cpu")
    adapted = PeftModel.from_pretrained(base, folder / "run" / "train" / "adapter").eval()
    with torch.no_grad():
        stock, whole = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
        with adapted.disable_adapter():
            untouched = adapted(input_ids=ids).logits
    assert (stock - untouched).abs().max() > 1e-4
    return bool((stock - whole).abs().max() < 1e-5)


@pytest.mark.slow
def test_a_changed_setting_runs_what_depends_on_it_and_no_more(tmp_path):
    path = write_run(tmp_path, "llama", adapter={"method": "random-a"})
    run_pipeline(load_config(path), Said(), progress=False)
    said = Said()
    run_pipeline(load_config(path, ["train.max_steps=2"]), said, progress=False)
    states = {name: state for name, state, _ in said}
    rerun = ("train", "eval-after", "report")
    assert states == {name: "done" if name in rerun else "skipped" for name in ("eval-before", "init", *rerun)}
    assert ("train", "runs", "again, train.max_steps is now 2, was 3") in said
    assert len(json.loads((tmp_path / "run" / "train" / "history.json").read_text())) == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_methods_without_a_covariance(method, tmp_path):
    config = load_config(write_run(tmp_path, "llama", adapter={"method": method, "rank": 2}))
    said = Said()
    report = run_pipeline(config, said, progress=False)
    names = [name for name, state, _ in said if state == "done"]
    assert names == stage_names(config) and "capture" not in names and ("init" in names) == (method != "full")
    assert (tmp_path / "run" / "train" / ("model" if method == "full" else "adapter")).is_dir()
    assert "covariance" not in report.read_text(encoding="utf-8").lower().partition("whole configuration")[0]
