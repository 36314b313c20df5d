"""Named recipes: what they hold, how a configuration takes them, and what an adapter says of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

import kore
from kore.adapter import KoreConfig, get_kore_model
from kore.artifacts import read_json
from kore.capture import capture_covariance
from kore.cli.main import main
from kore.errors import ConfigError
from kore.models import named_linears
from kore.pipeline.config import AdapterSection, CaptureSection, OldSection, ProtectionSection, RunConfig, TrainSection
from kore.pipeline.loading import dump_config
from kore.recipes import RECIPES, SECTIONS, describe, mark, recipe
from kore.training import TrainConfig, train
from tests.batches import MODELS, make_batches
from tests.test_pipeline_config import GOOD, folder, load  # noqa: F401
from tests.tiny import save_tiny, tiny_conversations

CLASSES = dict(zip(SECTIONS, (OldSection, CaptureSection, AdapterSection, TrainSection, ProtectionSection)))


def with_recipe(name):
    return GOOD.replace("seed: 3", f"seed: 3\n    recipe: {name}")


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_is_a_setting(name):
    chosen = recipe(name)
    assert chosen.name == name and chosen.about.endswith(".")
    for section, kind in CLASSES.items():
        assert set(chosen.section(section)) <= set(kind.model_fields), section
    KoreConfig(**chosen.adapter)
    TrainConfig(**chosen.train)
    with pytest.raises(TypeError):
        chosen.adapter["rank"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.adapter = {}


def test_the_settings_of_the_paper():
    paper, official = recipe("paper"), recipe("official")
    config = TrainConfig(**paper.train)
    assert (config.learning_rate, config.projector_learning_rate, config.epochs) == (2e-4, 2e-5, 6)
    assert (config.scheduler, config.warmup_ratio, config.weight_decay, config.bf16) == ("cosine", 0.03, 0, True)
    assert (paper.adapter["rank"], paper.adapter["scale"], paper.adapter["solver"]) == (
        "match-lora-128",
        "sqrt",
        "eigh",
    )
    assert paper.old == {"max_samples": 256, "balance": False} == official.old
    assert paper.capture == {"normalize": "none", "tokens": "prompt"}
    assert official.capture["normalize"] == "official" and official.adapter["solver"] == "svd"
    with pytest.raises(ConfigError, match="recipe: expected one of default, paper, official, got 'kore'"):
        recipe("kore")


def test_a_configuration_takes_them_where_it_says_nothing(load):  # noqa: F811
    plain, default = load(), load(with_recipe("default"))
    assert plain == default
    text = with_recipe("paper")
    paper = load(text)
    assert (paper.old.balance, paper.adapter.solver, paper.train.bf16) == (False, "eigh", True)
    assert (paper.adapter.rank, paper.train.learning_rate) == (8, 1e-2)  # as GOOD says
    assert load(text, "adapter.solver=auto", "old.balance=null").adapter.solver == "auto"
    assert load(GOOD, "recipe=official").capture.normalize == "official"
    assert RunConfig.model_validate(yaml.safe_load(dump_config(paper))) == paper
    with pytest.raises(ConfigError, match=r"recipe: expected 'default', 'paper' or 'official', got 'papers'"):
        load(GOOD, "recipe=papers")


def test_the_check_names_the_recipe_and_every_difference(folder, load, capsys):  # noqa: F811
    load(with_recipe("paper"))
    assert main(["run", str(folder / "run.yaml"), "--check", "capture.batch_size=9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "recipe: paper, with adapter.rank: 8, train.learning_rate: 0.01" in said and "stages: capture" in said


def test_only_what_decides_the_result_counts_as_a_change():
    old = OldSection(files=["a.json", "b.json"], on_bad_row="skip").model_dump(mode="json")
    sections = {name: kind().model_dump(mode="json") for name, kind in CLASSES.items() if name != "old"}
    assert describe("default", {**sections, "old": old}) == {"name": "default", "changed": {}}
    sections["train"] |= {"logging_steps": 3, "gradient_checkpointing": True, "batch_size": 2}
    sections["capture"] |= {"batch_size": 1, "memory_budget": "1GiB", "normalize": "official"}
    changed = describe("default", sections)["changed"]
    assert changed == {"train.batch_size": 2, "capture.normalize": "official"}
    later = describe("default", {"train": {"epochs": 1}}, {"name": "default", "changed": changed})
    assert later["changed"] == {"capture.normalize": "official", "train.epochs": 1}


def test_official_is_the_arithmetic_of_the_public_code():
    """svd(C) in float32, its last r columns U, svd(W0 U Uᵀ), √Σ on both sides."""
    model, batches = MODELS["llama"](), make_batches("llama", 3)
    one_by_one = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(3)]
    sums, name = 0, "model.layers.0.mlp.up_proj"

    def hook(module, args):
        nonlocal sums
        x = args[0].squeeze(0)
        x = x / x.max().abs()
        sums = sums + x.T @ x

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in one_by_one:
            keep = batch["attention_mask"][0].bool()
            model(input_ids=batch["input_ids"][:, keep])
    handle.remove()
    U = torch.linalg.svd(sums).U[:, -4:]
    S, V = torch.svd(named_linears(model)[name].weight.detach() @ (U @ U.T))[1:]
    expected = (V * S.sqrt())[:, :4].T

    official = recipe("official")
    cov = capture_covariance(model, batches, [name], official.capture["normalize"], progress=False)
    config = KoreConfig(**{**official.adapter, "rank": 4}, targets=[name])
    adapted = get_kore_model(model, cov, config, progress=False)
    A = adapted.get_base_model().get_submodule(name).lora_A["default"].weight
    cosines = (torch.linalg.svd(A.detach()).Vh[:4] @ torch.linalg.svd(expected).Vh[:4].T).svd().S
    torch.testing.assert_close(cosines, torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(A.norm(dim=1), expected.norm(dim=1), rtol=1e-3, atol=0)
    assert adapted.kore_info["null_spaces"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    save_tiny("llama", root / "model")
    tiny_conversations(root / "data", 6, text_only=True)
    return root


def test_in_python_it_is_written_when_it_is_said(work, tmp_path):
    from kore.data import Encoder, conversation_batches, load_conversations

    model, encoder = kore.load_model(work / "model", device="cpu"), Encoder.from_pretrained(work / "model")
    data, paper = load_conversations(work / "data" / "conversations.json"), recipe("paper")
    cov = capture_covariance(model, conversation_batches(data, encoder, 3), progress=False, **paper.capture)
    model = get_kore_model(model, cov, KoreConfig(**{**paper.adapter, "rank": 4}), progress=False)
    mark(model)
    assert "recipe" not in model.kore_info
    mark(model, "paper", cov=cov)
    assert model.kore_info["recipe"] == {"name": "paper", "changed": {"adapter.rank": 4}}
    with pytest.raises(ConfigError, match="recipe: expected one of"):
        mark(model, "papers")
    quiet = {"progress": False, "report_to": [], "save_steps": None}
    config = TrainConfig(**{**paper.train, **quiet, "max_steps": 1, "bf16": False})
    train(model, encoder, data, config, tmp_path, recipe="official")
    kept = {"adapter.rank": 4, "train.bf16": False, "train.max_steps": 1}
    assert read_json(tmp_path / "adapter" / "kore.json")["recipe"] == {"name": "paper", "changed": kept}


def test_single_commands_take_it_and_the_adapter_says_so(work, tmp_path):
    common = ["-m", f"{work}/model", "--device", "cpu"]
    data = ["-d", f"{work}/data/conversations.json"]
    official = ["--recipe", "official"]
    assert main(["capture", *common, *data, "-o", f"{tmp_path}/cov", *official]) == 0
    init = ["init", *common, "-c", f"{tmp_path}/cov", "-o", f"{tmp_path}/init", "--rank", "4"]
    assert main([*init, "--recipe", "paper"]) == 0
    found = read_json(tmp_path / "init" / "kore.json")
    assert found["recipe"] == {"name": "paper", "changed": {"adapter.rank": 4, "capture.normalize": "official"}}
    assert found["config"]["solver"] == "eigh"
    steps = ["--set", "train.max_steps=1", "--set", "train.report_to=none", "--set", "train.bf16=false"]
    assert main(["train", *common, *data, "-a", f"{tmp_path}/init", "-o", f"{tmp_path}/train", *steps]) == 0
    changed = read_json(tmp_path / "train" / "adapter" / "kore.json")["recipe"]["changed"]
    assert changed == {**found["recipe"]["changed"], "train.bf16": False, "train.max_steps": 1}
    assert main([*init, "--recipe", "kore"]) == 2
