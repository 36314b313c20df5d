"""The step-matched learning rate against first AdamW steps that are really taken, in float64."""

from __future__ import annotations

import statistics

import pytest
import torch

import kore
from kore import baselines
from kore.analysis import Update
from kore.analysis.rates import mean_l1, step_matched_rate
from kore.capture import capture_covariance
from kore.covariance import CovarianceSet, Group
from kore.errors import KoreError
from kore.models import base_model
from tests.batches import make_batches
from tests.tiny import tiny_llama

D_IN, D_OUT, RATE, RANK = 24, 10, 1e-3, 16


def rows(count, seed):
    """Graded, mixed normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, D_IN, dtype=torch.float64, generator=generator)
    mix = torch.linalg.qr(torch.randn(D_IN, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))).Q
    return x * torch.logspace(0, -2, D_IN, dtype=torch.float64) @ mix


def as_set(x, tokens=None):
    group = Group("layer", ("layer",), D_IN, len(x) if tokens is None else tokens)
    return CovarianceSet({"layer": x.T @ x}, [group], {})


def quiet(x, rank=8):
    """The directions in which x has least energy, rows of unlike lengths."""
    return (
        torch.linspace(0.2, 0.9, rank, dtype=torch.float64)[:, None] * torch.linalg.eigh(x.T @ x).eigenvectors.T[:rank]
    )


def moved(A, scaling, rate, x, train_a):
    """Mean |Δy| of tokens that each take a first AdamW step of their own, which lowers δ·y."""
    delta = torch.randn(len(x), D_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    B = torch.zeros(len(x), D_OUT, len(A), dtype=torch.float64, requires_grad=True)  # one for each token
    A = A.expand(len(x), *A.shape).clone().requires_grad_(train_a)
    optimizer = torch.optim.AdamW([B, A] if train_a else [B], lr=rate, weight_decay=0.0, eps=1e-30)

    def outputs():
        return scaling * (B @ (A @ x[:, :, None])).squeeze(2)

    (delta * outputs()).sum().backward()
    optimizer.step()
    return float(outputs().detach().abs().mean())


def test_first_adamw_steps_are_as_long_as_the_loras():
    noise = torch.randn(400, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    old, new = rows(400, 0), rows(400, 1) + 0.05 * noise
    A = quiet(old)
    found = step_matched_rate({"layer": Update(A, torch.zeros(D_OUT, 8), 0.5)}, as_set(new), RATE, RANK, 3 * RANK)
    A0 = torch.empty(RANK, D_IN, dtype=torch.float64)
    torch.nn.init.kaiming_uniform_(A0, a=5**0.5, generator=torch.Generator().manual_seed(3))  # PEFT's rule
    lora = moved(A0, 3.0, RATE, new, train_a=True)
    assert moved(A, 0.5, found.learning_rate, new, train_a=False) == pytest.approx(lora, rel=0.15)
    assert found.factor > 5  # equal rates would not do
    assert found.factor == pytest.approx(found.by_module["layer"] / RATE)


def test_mean_l1_is_that_of_normal_inputs():
    A, x = torch.randn(5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), rows(20000, 3)
    assert mean_l1(A, x.T @ x, len(x)) == pytest.approx(float((x @ A.T).abs().sum(1).mean()), rel=0.02)


def test_first_steps_of_a_whole_model():
    """One step on a batch of new data: how far B's change moves each layer's outputs on that data."""
    old, new = make_batches("llama", 3), make_batches("llama", 1)
    new[0]["input_ids"] = new[0]["input_ids"].flip(1)
    cov = capture_covariance(tiny_llama().double(), old, progress=False, dtype=torch.float64)
    fresh = capture_covariance(tiny_llama().double(), new, progress=False, dtype=torch.float64)

    def steps(model, rate):
        trained = [p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, eps=1e-30)
        model(**new[0]).loss.backward()
        optimizer.step()
        found = {}
        for name, module in base_model(model).named_modules():
            if hasattr(module, "lora_B"):
                BA = (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach().double()
                moved = module.scaling["default"] * BA
                found[name] = float((moved @ fresh[name] * moved).sum() / fresh.tokens(name)) ** 0.5
        return found

    adapted = kore.get_kore_model(tiny_llama().double(), cov, kore.KoreConfig(rank=12), progress=False)
    rate = step_matched_rate(adapted, fresh, RATE, RANK).learning_rate
    lora = steps(baselines.prepare_model(tiny_llama().double(), "lora", rank=RANK, progress=False), RATE)
    own = steps(adapted, rate)
    ratios = [own[name] / lora[name] for name in lora]
    assert 0.6 < statistics.median(ratios) < 1.6


def test_units_of_the_covariance_and_of_the_adapter():
    x = rows(300, 1)
    A, B = quiet(rows(300, 0)), torch.zeros(D_OUT, 8)
    rate = step_matched_rate({"layer": Update(A, B, 1.0)}, as_set(x), RATE, RANK).learning_rate
    twice = CovarianceSet({"layer": 2 * x.T @ x}, [Group("layer", ("layer",), D_IN, 600)], {})
    assert step_matched_rate({"layer": Update(A, B, 1.0)}, twice, RATE, RANK).learning_rate == pytest.approx(rate)
    half = step_matched_rate({"layer": Update(A, B, -2.0)}, as_set(x), RATE, RANK)
    assert half.learning_rate == pytest.approx(rate / 2)
    alpha = step_matched_rate({"layer": Update(A, B, 1.0)}, as_set(x), 2 * RATE, RANK, RANK)
    assert alpha.learning_rate == pytest.approx(rate)


def test_model_and_directory_give_one_rate_and_old_data_a_warning(tmp_path):
    old, new = (capture_covariance(tiny_llama(), make_batches("llama", n), progress=False) for n in (3, 1))
    model = kore.get_kore_model(tiny_llama(), old, kore.KoreConfig(rank=12), progress=False)
    kore.save_adapter(model, tmp_path / "adapter")
    found = step_matched_rate(model, new)
    assert step_matched_rate(tmp_path / "adapter", new) == found
    assert found.spread[0] <= found.learning_rate <= found.spread[1]
    assert set(found.by_module) == set(new.modules)
    for adapter in (model, tmp_path / "adapter"):
        with pytest.warns(UserWarning, match="old data"):
            high = step_matched_rate(adapter, old)
    assert high.learning_rate > found.learning_rate


def test_errors():
    x, B = rows(50, 0), torch.zeros(D_OUT, 2)
    good = {"layer": Update(torch.randn(2, D_IN), B, 1.0)}
    for arguments, message in (
        ((good, as_set(x), 0.0), "reference_rate: expected a positive number, got 0"),
        ((good, as_set(x), 1e-3, 0), "reference_rank"),
        ((good, as_set(x), 1e-3, 4, float("nan")), "reference_alpha"),
        (({"other": good["layer"]}, as_set(x)), "none of the covariance's layers"),
        (({"layer": Update(torch.randn(2, 7), B, 1.0)}, as_set(x)), "d_in = 7, the covariance 24"),
        (({"layer": Update(torch.zeros(2, D_IN), B, 1.0)}, as_set(x)), "cannot learn"),
        ((good, as_set(x, tokens=0)), "counts no tokens"),
        ((torch.nn.Linear(2, 2), as_set(x)), "without one"),
    ):
        with pytest.raises(KoreError, match=message):
            step_matched_rate(*arguments)
