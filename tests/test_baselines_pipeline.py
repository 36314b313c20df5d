"""Baselines in ``kore run`` and the single commands: options, old data, and what is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kore.artifacts import read_json
from kore.baselines import baseline_of, prepare_model
from kore.cli.main import main
from kore.errors import ConfigError
from kore.pipeline.launch import train_command
from kore.pipeline.loading import load_config
from kore.pipeline.run import build_stages, run_pipeline, stage_names
from kore.recipes import mark
from tests.test_pipeline import Said, adapter_gives_the_trained_logits, write_run
from tests.tiny import tiny_llama

OPTIONS = {
    "replay": {"share": 0.5},
    "ewc": {"strength": 50.0, "over": "weights", "samples": 4},
    "lwf": {"strength": 2.0},
}
BRIEF = {"eval": {"new": [], "old": []}}


def write(folder, kind, method, options, **more):
    path = write_run(folder, kind, adapter={"method": method, "options": options}, **more)
    values = yaml.safe_load(path.read_text())
    values["old"] = {"files": values["old"]["files"], "image_root": values["old"]["image_root"], "max_samples": 2}
    path.write_text(yaml.safe_dump(values))
    return path


SLOW = [("llava", "replay"), ("llava", "ewc"), ("llava", "lwf"), ("qwen_vl", "replay"), ("qwen_vl", "ewc")]


@pytest.mark.parametrize(
    ("kind", "method"),
    [("qwen_vl", "lwf"), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)],
)
def test_from_yaml_to_report(kind, method, tmp_path):
    asks = {} if (kind, method) == ("llava", "ewc") else BRIEF
    config = load_config(write(tmp_path, kind, method, OPTIONS[method], **asks))
    said = Said()
    report = run_pipeline(config, said, progress=False)
    assert stage_names(config) == [*(["eval-before"] if asks == {} else []), "init", "train"] + (
        ["eval-after"] if asks == {} else []
    ) + ["report"]
    title = {"replay": "Replay", "ewc": "EWC", "lwf": "LwF"}[method]
    assert f"{title} on model" in report.read_text(encoding="utf-8")
    adapter = tmp_path / "run" / "train" / "adapter"
    info = read_json(adapter / "kore.json")
    assert info["method"] == method and OPTIONS[method].items() <= info["options"].items()
    assert baseline_of(adapter).options.model_dump(mode="json") == info["options"]
    assert info["recipe"]["changed"]["adapter.options"] == OPTIONS[method]
    history = read_json(tmp_path / "run" / "train" / "history.json")
    assert len(history) == 3 and ("penalty" in history[-1]) == (method != "replay")
    if method != "replay":
        assert history[0]["penalty"] == 0 and history[-1]["penalty"] > 0
    if method == "ewc":
        assert "nats for each old token" in " ".join(map(str, said))
    assert (tmp_path / "run" / "train" / "penalty" / "fisher").is_dir() == (method == "ewc")
    if method == "lwf":
        assert adapter_gives_the_trained_logits(tmp_path, kind)
    if method == "ewc":  # what train.processes starts under torchrun, old data and its images included
        stage = next(one for one in build_stages(config) if one.name == "train")
        assert main(train_command(replace(stage, output=tmp_path / "again"))) == 0
        wanted, found = (
            load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (stage.output, tmp_path / "again")
        )
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    said.clear()
    run_pipeline(config, said, progress=False)
    assert {state for _, state, _ in said} == {"skipped"}


@pytest.mark.slow
def test_a_model_trained_in_full_and_what_depends_on_what(tmp_path):
    path = write(tmp_path, "llama", "ewc-full", {"strength": 5.0}, **BRIEF)
    config = load_config(path)
    run_pipeline(config, Said(), progress=False)
    run = tmp_path / "run"
    assert stage_names(config) == ["train", "report"] and (run / "train" / "model" / "config.json").is_file()
    assert read_json(run / "train" / "history.json")[-1]["penalty"] > 0
    assert "EWC, full fine-tuning on model" in (run / "report.html").read_text(encoding="utf-8")

    def inputs(*overrides):
        return next(one for one in build_stages(load_config(path, overrides)) if one.name == "train").inputs()

    def changed(*overrides):
        one, other = inputs(), inputs(*overrides)
        return {key for key in {**one, **other} if one.get(key) != other.get(key)}

    assert changed("adapter.options.strength=6") == {"adapter.options"}
    assert changed("old.max_samples=1") == set(), "that is for capture alone"
    assert {"adapter.method", "adapter.options", "old.files"} <= changed("adapter.method=full", "adapter.options={}")
    stage = next(one for one in build_stages(config) if one.name == "train")
    assert main(train_command(replace(stage, output=tmp_path / "again"))) == 0
    assert read_json(tmp_path / "again" / "run.json") == read_json(run / "train" / "run.json")
    assert read_json(tmp_path / "again" / "history.json")[-1]["loss"] == pytest.approx(
        read_json(run / "train" / "history.json")[-1]["loss"], rel=1e-5
    )


@pytest.mark.parametrize("method", [*OPTIONS, "lora"])
def test_a_budget_may_be_named_as_for_a_frozen_a(method):
    model = prepare_model(tiny_llama(), method, rank="match-lora-4")
    assert model.kore_info["rank"] == 4 and model.peft_config["default"].r == 4


def test_old_data_that_is_missing_is_said_at_once(tmp_path, capsys):
    path = write(tmp_path, "llama", "replay", {}, **BRIEF)
    with pytest.raises(ConfigError, match="old: method replay needs old data"):
        load_config(path, ["old=null"])
    with pytest.raises(ConfigError, match=r"adapter: options.shares: no such option of method replay; it has share"):
        load_config(path, ["adapter.options.shares=1"])
    common = ["-m", f"{tmp_path}/model", "--device", "cpu"]
    assert main(["init", *common, "--method", "replay", "--rank", "4", "-o", f"{tmp_path}/init"]) == 0
    train = ["train", *common, "-d", f"{tmp_path}/data/conversations.json", "-o", f"{tmp_path}/train"]
    for words, said in (
        ([*train, "-a", f"{tmp_path}/init"], "old.files (kore train: --old)"),
        ([*train, "--full", "--set", "adapter.method=ewc-full"], "method ewc-full needs old conversations"),
        ([*train, "--full", "--set", "adapter.method=ewc"], "--full: method ewc trains an adapter"),
        (["init", *common, "--method", "ewc-full", "-o", f"{tmp_path}/x"], "ewc-full has no adapter to make"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "train" / "run.json").exists()


def test_options_as_they_are_by_default_change_no_recipe():
    for options, expected in (({}, {}), ({"share": 0.1}, {}), ({"share": 0.2}, {"share": 0.2})):
        model = prepare_model(tiny_llama(), "replay", rank=4, options=options)
        mark(model, "default")
        changed = model.kore_info["recipe"]["changed"]
        assert changed.get("adapter.options", {}) == expected and changed["adapter.method"] == "replay"
        assert json.loads(json.dumps(model.kore_info["options"])) == {"share": options.get("share", 0.1)}
