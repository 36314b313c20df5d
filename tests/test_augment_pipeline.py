"""The augment stage of ``kore run``."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import yaml

from kore.augmentation.generators.rules import RulesGenerator
from kore.cli import main
from kore.errors import ConfigError, DataError, Unavailable
from kore.pipeline.loading import load_config
from kore.pipeline.report_augment import add_section
from kore.pipeline.run import build_stages, run_pipeline, stage_names
from kore.pipeline.stage import run_stages
from kore.pipeline.workbench import Workbench
from kore.report import Report
from tests.augment_knowledge import write_knowledge
from tests.test_pipeline import Said
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def _small_collections():
    """Leave what is loaded, such as torch, out of the collections between stages, which take half of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


def write_run(folder: Path, **changes) -> Path:
    """A text-only run whose new data are made from three items."""
    save_tiny("llama", folder / "model")
    write_knowledge(folder / "knowledge.jsonl", 3, images=False)
    config = {
        "output_dir": "run",
        "seed": 3,
        "model": {"path": "model", "device": "cpu"},
        "adapter": {"method": "random-a", "rank": 2},
        "augment": {"knowledge": "knowledge.jsonl", "tasks": ["dialogue"], "quality": False},
        "train": {"max_steps": 2, "batch_size": 2, "logging_steps": 1, "report_to": "none"},
    }
    for section, values in changes.items():
        config[section] = {**config.get(section, {}), **values}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def test_a_run_trains_on_what_it_makes_from_knowledge(tmp_path):
    path = write_run(tmp_path)
    config = load_config(path)
    assert config.augment.seed == 3
    said = Said()
    report = run_pipeline(config, said, progress=False)
    assert [name for name, state, _ in said if state == "done"] == stage_names(config)
    assert stage_names(config)[0] == "augment"
    text = report.read_text(encoding="utf-8")
    assert "Augmentation" in text and "3 conversations" in text
    assert len(json.loads((tmp_path / "run" / "augment" / "llava.json").read_text())) == 3
    assert load_config(tmp_path / "run" / "config.yaml") == config
    said.clear()
    run_pipeline(config, said, progress=False)
    assert {state for _, state, _ in said} == {"skipped"}

    # Changed knowledge makes new data, and training reads those and not what the check has read before.
    write_knowledge(tmp_path / "knowledge.jsonl", 4, images=False)
    said.clear()
    run_pipeline(load_config(path), said, progress=False)
    states = {name: state for name, state, _ in said}
    assert states == {"augment": "done", "init": "skipped", "train": "done", "report": "done"}
    assert ("augment", "runs", "again, augment.knowledge has changed") in said
    assert "4 conversations" in report.read_text(encoding="utf-8")


def test_what_a_service_did_not_answer_is_said_and_tried_again_when_asked(tmp_path, monkeypatch):
    down = True
    answer = RulesGenerator.generate

    def generate(self, request):
        if down and request.item.id == "news-1":
            raise Unavailable("the server sleeps")
        return answer(self, request)

    monkeypatch.setattr(RulesGenerator, "generate", generate)
    path = write_run(tmp_path, augment={"limits": {"retries": 0}})
    config = load_config(path)

    def said_of_augment(*rerun):
        said = Said()
        run_stages(build_stages(config)[:1], Workbench(config.model, False), said, rerun)
        return said[-1]

    words = "3 items, 2 conversations, 0 images, 1 failure, 1 of them where a service did not answer; --rerun augment"
    _, state, remark = said_of_augment()
    assert state == "done" and remark.startswith(words)
    _, state, remark = said_of_augment()
    assert state == "skipped" and words in remark
    report = Report("x")
    add_section(report, tmp_path / "run" / "augment")
    assert "Of these, 1 may pass" in report.html()
    down = False
    assert said_of_augment("augment")[2].startswith("3 items, 3 conversations, 0 images (")


def test_what_changes_no_result_runs_nothing_again(tmp_path):
    path = write_run(tmp_path)

    def said_of_augment(*changes):
        said = Said()
        run_stages(build_stages(load_config(path, changes))[:1], Workbench(load_config(path).model, False), said)
        return said

    assert said_of_augment()[-1][:2] == ("augment", "done")
    prices = ["augment.generator.price_input=1", "augment.generator.price_output=2"]
    assert [state for _, state, _ in said_of_augment("augment.workers=1", *prices)] == ["skipped"]
    assert ("augment", "runs", "again, augment.rounds is now 1, was 10") in said_of_augment("augment.rounds=1")


def test_check_shows_the_stage_and_its_settings(tmp_path, capsys):
    assert main(["run", str(write_run(tmp_path)), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "stages: augment, init, train, report" in shown and "knowledge: " in shown and "rounds: 10" in shown
    assert not (tmp_path / "run").exists()


def test_mistakes_show_before_the_first_stage(tmp_path):
    path = write_run(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown key augment\.round; did you mean augment\.rounds"):
        load_config(path, ["augment.round=3"])
    with pytest.raises(ConfigError, match=r"new.image_root: the augmented data have a folder of their own"):
        load_config(path, [f"new.image_root={tmp_path}"])
    with pytest.raises(ConfigError, match="expected the files of the new data, or an augment section"):
        load_config(path, ["augment=null"])
    with (tmp_path / "knowledge.jsonl").open("a") as file:
        file.write('{"type": "film"}\n')
    with pytest.raises(DataError, match=r"knowledge.jsonl:4: "):
        run_pipeline(load_config(path), Said(), progress=False)
    assert not (tmp_path / "run" / "adapter-init").exists()


def test_own_files_are_trained_on_beside_the_made_ones(tmp_path):
    path = write_run(tmp_path)
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Mira."}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": "x", "conversations": turns}]))
    config = load_config(path, [f"new.files={tmp_path}/own.json"])
    assert [file.name for file in config.new_data.files] == ["llava.json", "own.json"]
