"""Two-sided protection and recipes in ``kore run`` and the single commands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kore.artifacts import read_json
from kore.capture import capture_output_gradients
from kore.cli.main import main
from kore.covariance import load_covariance, load_output_gradients
from kore.data import Encoder, load_conversations, prompt_batches
from kore.errors import ConfigError
from kore.models import load_model
from kore.pipeline.launch import train_command
from kore.pipeline.loading import load_config
from kore.pipeline.run import build_stages, run_pipeline, stage_names
from tests.test_pipeline import Said, write_run

PROTECTION = {"strength": "auto", "max_divergence": 0.005, "components": 8, "batch_size": 2}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run with two groups of old data, the second twice as long: its folder and its configuration file."""
    folder = tmp_path_factory.mktemp("protected")
    path = write_run(folder, "llama", protection=PROTECTION, eval={"new": [], "old": []})
    rows = json.loads((folder / "data" / "conversations.json").read_text())
    for name, part in (("short", rows[:2]), ("long", rows[2:])):
        (folder / "data" / f"{name}.json").write_text(json.dumps(part))
    old = {"files": ["data/short.json", "data/long.json"]}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "recipe": "paper", "old": old}))
    config = load_config(path, ["old.balance=true", "train.bf16=false"])
    run_pipeline(config, Said(), progress=False)
    return folder, path, config


def test_the_run_captures_protects_and_says_so(done):
    folder, _, config = done
    assert stage_names(config) == ["capture", "capture-gradients", "init", "train", "report"]
    run = folder / "run"
    history = read_json(run / "train" / "history.json")
    strength = read_json(run / "train" / "penalty" / "strength.json")["strength"]
    assert 0 < history[-1]["old_divergence"] < 0.005
    assert history[-1]["penalty"] == pytest.approx(2 * strength * history[-1]["old_divergence"], rel=1e-4)
    untrained = read_json(run / "adapter-init" / "kore.json")["recipe"]
    assert untrained == {"name": "paper", "changed": {"old.balance": True, "adapter.rank": 4}}
    trained = read_json(run / "train" / "adapter" / "kore.json")["recipe"]
    expected = {f"protection.{key}": value for key, value in PROTECTION.items() if key != "batch_size"}
    assert trained["name"] == "paper" and {key: trained["changed"][key] for key in expected} == expected
    assert trained["changed"]["train.max_steps"] == 3 and trained["changed"]["old.balance"] is True
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "paper, with" in page and "nats for each old token" in page


def test_groups_are_balanced_row_for_row(done):
    """G / N is the mean over the groups of G_k / N_k, C / N that of equal traces."""
    folder, _, _ = done
    model, encoder = load_model(folder / "model", device="cpu"), Encoder.from_pretrained(folder / "model")
    parts = []
    for name in ("short", "long"):
        batches = prompt_batches(load_conversations(folder / "data" / f"{name}.json"), encoder, 2)
        parts.append(capture_output_gradients(model, batches, progress=False))
    G = load_output_gradients(folder / "run" / "gradients")
    name = "model.layers.1.mlp.down_proj"
    assert parts[0].tokens(name) != parts[1].tokens(name)
    mean = sum(part[name] / part.tokens(name) for part in parts) / 2
    torch.testing.assert_close(G[name] / G.tokens(name), mean, rtol=1e-4, atol=1e-8)
    C = load_covariance(folder / "run" / "covariance")
    assert G.tokens(name) == C.tokens(name) and C.merged_from["weights"] == "balanced"
    assert not (folder / "run" / "gradients" / "groups").exists()


def test_what_is_done_stays_done_and_only_training_depends_on_the_strength(done):
    _, path, config = done
    said = Said()
    run_pipeline(config, said, progress=False)
    assert {state for _, state, _ in said} == {"skipped"}
    changed = load_config(path, ["old.balance=true", "train.bf16=false", "protection.strength=3"])
    for one, other in zip(build_stages(config)[:-1], build_stages(changed)[:-1]):
        before, after = one.inputs(), other.inputs()
        differ = {key for key in {**before, **after} if before.get(key) != after.get(key)}
        expected = {"protection.strength", "protection.max_divergence"} if one.name == "train" else set()
        assert differ == expected, one.name


def test_the_command_of_the_training_processes_does_what_the_stage_does(done, tmp_path):
    """It is what ``train.processes`` starts under torchrun."""
    config = done[2]
    stage = next(one for one in build_stages(config) if one.name == "train")
    assert main(train_command(replace(stage, output=tmp_path / "train"))) == 0
    ours, theirs = tmp_path / "train" / "adapter", stage.result
    assert read_json(ours / "kore.json") == read_json(theirs / "kore.json")
    B = load_file(ours / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for name, value in B.items() if "lora_B" in name) > 1e-4


def test_single_commands_do_the_same(done, tmp_path, capsys):
    folder, _, _ = done
    common, data = ["-m", f"{folder}/model", "--device", "cpu"], ["-d", f"{folder}/data/short.json"]
    gradients = ["capture", "--gradients", *common, *data, "-o", f"{tmp_path}/gradients", "--batch-size", "2"]
    assert main([*gradients, "--memory-budget", "1MiB"]) == 0
    found = load_output_gradients(tmp_path / "gradients")
    assert "model.layers.0.self_attn.o_proj" in found and found.selection == "text"
    train = ["train", *common, *data, "-a", f"{folder}/run/adapter-init", "-o", f"{tmp_path}/train"]
    train += ["--set", "train.max_steps=1", "--set", "train.report_to=none"]
    capsys.readouterr()
    assert main([*train, "--protect", f"{folder}/run/covariance"]) == 2
    assert "--protect-gradients: expected both" in capsys.readouterr().err
    train += ["--protect", f"{folder}/run/covariance", "--protect-gradients", f"{tmp_path}/gradients"]
    assert main([*train, "--protection-strength", "2"]) == 0
    assert read_json(tmp_path / "train" / "history.json")[-1]["penalty"] == 0  # B is 0 before the first step
    changed = read_json(tmp_path / "train" / "adapter" / "kore.json")["recipe"]["changed"]
    assert changed["protection.strength"] == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.method=lora"], "protection: it needs a frozen A"),
        (["adapter.method=random-a", "old=null"], "protection: it needs old data"),
        (["protection.strength=-1"], "protection.strength"),
        (["protection.components=null", "protection.dtype=bfloat16"], "bfloat16 needs components"),
        (["protection.strenght=1"], "unknown key protection.strenght; did you mean protection.strength"),
    ],
)
def test_what_is_wrong_is_said(done, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(done[1], overrides)
