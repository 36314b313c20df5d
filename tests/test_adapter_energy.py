"""A rank for each layer from the share of the old inputs' energy it may read."""

from __future__ import annotations

import json

import pytest
import torch

import kore
from kore.adapter import KoreConfig, get_kore_model, load_kore_model, save_adapter
from kore.adapter.wrap import wrap_lora
from kore.analysis import leak
from kore.capture import capture_covariance
from kore.errors import ConfigError
from kore.nullspace import energy_space
from tests.batches import KINDS, MODELS, logits, make_batch, make_batches

SHARE = 0.02


@pytest.fixture(scope="module")
def covariances():
    return {kind: capture_covariance(MODELS[kind](), make_batches(kind, 4), progress=False) for kind in KINDS}


def make(kind, covariances, share=SHARE):
    model = get_kore_model(MODELS[kind](), covariances[kind], KoreConfig(rank=f"energy:{share}"), progress=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_rank_below_the_share_in_every_layer(kind, covariances):
    model = make(kind, covariances)
    ranks = model.kore_info["rank"]
    assert len(set(ranks.values())) > 1 and list(ranks) == list(leak(model, covariances[kind]))
    for name, share in leak(model, covariances[kind]).items():
        C = covariances[kind][name].double()
        assert share < SHARE <= float(torch.linalg.eigvalsh(C)[: ranks[name] + 1].sum() / C.trace())
        layer = model.get_base_model().get_submodule(name)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_reads_the_ranks_from_their_standard_place(kind, covariances, tmp_path):
    from peft import PeftModel

    model, batch = make(kind, covariances), make_batch(kind)
    expected = logits(model, batch)
    assert (expected - logits(MODELS[kind](), batch)).abs().max() > 1e-2
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["rank_pattern"] == config["alpha_pattern"]
    assert config["lora_alpha"] == config["r"] not in config["rank_pattern"].values()
    stock = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(stock, batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(stock.merge_and_unload(), batch), expected, rtol=0, atol=1e-5)
    ours = load_kore_model(MODELS[kind](), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=0)


def test_accelerate_takes_layers_of_different_rank(covariances):
    model, batch = make("llama", covariances), make_batch("llama")
    expected = logits(model, batch)
    done = kore.accelerate(model)
    assert len(done.accelerated) == 14 and len(done.groups) == 4
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)


def test_energy_rank_at_its_ends():
    C = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def energy_rank(C, share):
        solved = energy_space(C, share)
        assert solved.eigenvalues.shape == (solved.basis.shape[1],)
        return solved.basis.shape[1]

    assert [energy_rank(C, share) for share in (0.05, 0.1, 0.11, 0.3, 0.31, 0.61, 0.999)] == [1, 1, 1, 1, 2, 3, 3]
    assert energy_rank(torch.zeros(5, 5), 0.1) == 5
    tiny = torch.diag(torch.tensor([-1e-18, 0.0, 1e-9, 1.0], dtype=torch.float64))
    assert energy_rank(tiny, 1e-12) == 2 and energy_rank(tiny, 1e-3) == 3


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "much", "nan", ""])
def test_wrong_shares(share):
    with pytest.raises(ConfigError, match=r"energy:τ.*0 < τ < 1"):
        KoreConfig(rank=f"energy:{share}")


@pytest.mark.parametrize("given", [False, True])
def test_energy_needs_a_covariance_and_its_null_space(given, covariances):
    config = KoreConfig(rank="energy:0.1", constraint="none")
    with pytest.raises(ConfigError, match="needs a covariance"):
        get_kore_model(MODELS["llama"](), covariances["llama"] if given else None, config)


def test_a_layer_whose_name_ends_another_keeps_its_own_rank():
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(8, 8)

    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.inner, self.other = Inner(), torch.nn.Linear(8, 8)
            self.config = {"model_type": "outer"}

        def prepare_inputs_for_generation(self):
            raise NotImplementedError

    ranks = {"a": 2, "inner.a": 3, "other": 4}
    model = wrap_lora(Outer(), list(ranks), ranks, None, None, 0).get_base_model()
    assert {name: model.get_submodule(name).r["default"] for name in ranks} == ranks
