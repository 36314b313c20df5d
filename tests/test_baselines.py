"""Each baseline leaves exactly the stated parameters trainable."""

from __future__ import annotations

import json
import re

import pytest
import torch

from kore import baselines
from kore.adapter import KoreConfig, get_kore_model, load_kore_model, save_adapter
from kore.capture import capture_covariance
from kore.errors import ConfigError, ModelError
from kore.models import language_model_linears
from tests.batches import KINDS, MODELS, logits, make_batch, make_batches


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "random-a"])
def test_adapters_train_the_stated_factors_and_the_projector(kind, method):
    model = baselines.prepare_model(MODELS[kind](), method, rank=4)
    projector = {name for name in trainable(model) if ".modules_to_save." in name}
    assert bool(projector) == (kind != "llama")
    sides = "AB" if method == "lora" else "B"
    expected = {
        f"base_model.model.{name}.lora_{side}.default.weight"
        for name in language_model_linears(MODELS[kind]())
        for side in sides
    }
    assert trainable(model) - projector == expected
    batch = make_batch(kind)
    torch.testing.assert_close(logits(model.eval(), batch), logits(MODELS[kind](), batch), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_full_trains_everything_but_the_vision_tower(kind):
    model = MODELS[kind]()
    assert baselines.prepare_model(model, "full") is model
    frozen = {name for name, _ in model.named_parameters()} - trainable(model)
    vision = {
        name
        for name, _ in model.named_parameters()
        if ("vision_tower" in name or "visual" in name) and "merger" not in name
    }
    assert frozen == vision and bool(vision) == (kind != "llama")


def test_kore_is_get_kore_model():
    cov = capture_covariance(MODELS["llava"](), make_batches("llava", 4))
    model = baselines.prepare_model(MODELS["llava"](), "kore", cov, rank=5, scale="orthonormal")
    config = KoreConfig(rank=5, scale="orthonormal", modules_to_save="auto")
    other = get_kore_model(MODELS["llava"](), cov, config)
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys() and trainable(model) == trainable(other)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_lora_is_seeded_scaled_and_trains_a_after_loading(tmp_path):
    def factor(**options):
        model = baselines.prepare_model(MODELS["llama"](), "lora", rank=4, **options)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        return model, layer.lora_A["default"].weight, layer.scaling["default"]

    model, A, scaling = factor()
    assert scaling == 2.0
    assert torch.equal(A, factor()[1]) and not torch.equal(A, factor(seed=1)[1]) and factor(lora_alpha=4)[2] == 1.0
    save_adapter(model, tmp_path / "a")
    loaded = load_kore_model(MODELS["llama"](), tmp_path / "a", trainable=True)
    assert trainable(loaded) == trainable(model) and any(".lora_A." in name for name in trainable(loaded))
    assert json.loads((tmp_path / "a" / "kore.json").read_text())["method"] == "lora"


@pytest.mark.parametrize("method", ["lora", "random-a"])
def test_the_random_state_of_the_caller_is_left_alone(method):
    model = MODELS["llama"]()
    state = torch.get_rng_state()
    baselines.prepare_model(model, method, rank=4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ewk", {"rank": 4}, "method: expected one of kore, lora, full, random-a"),
        ("lora", {}, "rank: expected a number"),
        ("lora", {"rank": "energy:0.1"}, "rank: 'energy:0.1' needs a covariance"),
        ("lora", {"rank": 1000}, "larger than d_in"),
        ("kore", {"rank": 4}, "needs a covariance"),
    ],
)
def test_wrong_arguments(method, options, message):
    with pytest.raises(ConfigError, match=message):
        baselines.prepare_model(MODELS["llama"](), method, **options)


def test_an_adapted_model_is_refused():
    model = baselines.prepare_model(MODELS["llama"](), "random-a", rank=4)
    for method in baselines.METHODS:
        with pytest.raises(ModelError, match="merge or unload"):
            baselines.prepare_model(model, method, rank=4)


def test_every_method_says_what_it_is():
    kinds = baselines.BASELINES.values()
    assert len({kind.title for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert kind.__doc__ and ("arXiv" in kind.source or "http" in kind.source), kind
        assert f"``{kind.method}``" in baselines.__doc__
        for name, field in kind.Options.model_fields.items():
            assert field.description, f"{kind.method}: {name}"


def test_the_help_of_init_names_every_method_that_makes_an_adapter(capsys):
    """It is written out in the command line, which must not load the methods to show it."""
    from kore.cli.main import main

    assert main(["init", "--help"]) == 0
    said = set(re.findall(r"[a-z0-9-]+", re.sub(r"[│\s]+", " ", capsys.readouterr().out)))
    wanted = {method for method, kind in baselines.BASELINES.items() if not kind.in_full}
    assert wanted <= said and not said & (set(baselines.METHODS) - wanted - {"full"})
