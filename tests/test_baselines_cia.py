"""CIA: the rate of its average, and that the average is what comes out, also of a stopped run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from kore.baselines import baseline
from kore.data import load_conversations
from kore.errors import ConfigError, KoreError
from kore.penalty import Start
from kore.protection.averaging import Averaging, official_beta, paper_beta
from kore.training import train
from kore.training.trainer import KoreTrainer
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import prepared

QUICK = dict(batch_size=4, logging_steps=1, save_steps=None, report_to=[], progress=False, learning_rate=2e-2)
QUICK |= dict(warmup_ratio=0, scheduler="constant")


def one(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize(("now", "before", "shadow"), [(3.0, 2.2, 0.5), (1.9, 2.5, -1.0)])
def test_of_a_parabola_beta_is_where_the_paper_s_objective_is_least(now, before, shadow):
    bent, least = 4.0, -2.0

    def gradient(x):
        return bent * (x - least)

    beta = paper_beta(one(gradient(now)), one(gradient(before)), one(now), one(before), one(shadow))
    assert beta == pytest.approx((gradient(now) + 1) / (bent * (now - shadow)), rel=1e-13)

    def objective(b):
        """L(θ*) − L(θ) + (θ* − θ*_before), exact for a parabola."""
        average = b * shadow + (1 - b) * now
        return bent / 2 * (average - least) ** 2 - bent / 2 * (now - least) ** 2 + (average - shadow)

    b = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective(b), b)
    assert abs(float(slope)) < 1e-12 and objective(beta) < min(objective(beta - 0.01), objective(beta + 0.01))


def test_the_official_rate_and_norms_over_a_tensor():
    g, g_before, now, before, shadow = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    norm = [float(x.abs().sum()) for x in (g, g - g_before, now - shadow, now - before)]
    assert official_beta(g, g_before, now, shadow) == pytest.approx(1 - 2 * (1 + norm[0]) / (norm[2] * norm[1]))
    wanted = (norm[0] + 1) / (norm[2] * (norm[1] / norm[3]))
    assert paper_beta(g, g_before, now, before, shadow) == pytest.approx(wanted, rel=1e-12)
    assert math.isnan(paper_beta(g, g, now, before, shadow)) and math.isnan(official_beta(g, g_before, now, now))


class Toy(nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value, dtype=torch.float64))


def follow(averaging, path, gradients=None):
    """Take a model along a path, as an optimizer does."""
    model = Toy(path[0])
    averaging.begin(Start(model, None, [], 1, Path(), lambda: 0.0))
    for step, value in enumerate(path[1:]):
        model.weight.grad = torch.full((2,), 0.0 if gradients is None else gradients[step], dtype=torch.float64)
        averaging.before_update()
        model.weight.data.fill_(value)
        averaging.after_update()
    averaging.finish()
    return float(model.weight[0].detach())


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("rule", ["paper", "official", "constant"])
def test_at_a_constant_rate_it_is_the_weighted_sum(rule, beta):
    """Without a gradient no rule finds a rate, so each takes the fallback."""
    path = [0.5, 2.0, -1.0, 4.0, 3.0]
    averaging = Averaging(rule, beta)
    wanted = beta**4 * path[0] + sum((1 - beta) * beta ** (4 - t) * path[t] for t in range(1, 5))
    assert follow(averaging, path) == pytest.approx(wanted, rel=1e-13)
    assert averaging.log() == {"adaptive_beta": 0.0, "mean_beta": beta}


def test_the_rates_are_used_where_they_are_between_0_and_1():
    """Of ½ · 20 θ², from 1 down; there are two parameters alike."""
    path = [1.0, 0.2, 0.02, 0.01]
    gradients = [20 * value for value in path]
    shadow = path[0]
    for t in (1, 2):
        apart = abs(path[t] - shadow) * 2
        beta = (2 * gradients[t] + 1) / (apart * 20)
        shadow = shadow + (path[t] - shadow) * (1 - beta)
        assert 0 < beta < 1
    wanted = shadow + (path[3] - shadow) * 0.01
    assert follow(Averaging("paper"), path, gradients) == pytest.approx(wanted, rel=1e-12)
    first = 1 + 0.1 * 8  # the first step has one gradient only
    wanted = first + (30 - first) * 2 * (1 + 40) / (2 * (30 - first) * 60)
    assert follow(Averaging("official", 0.9), [1.0, 9.0, 30.0], [10.0, -20.0]) == pytest.approx(wanted, rel=1e-12)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cia")
    save_tiny("llama", root / "llama")
    tiny_conversations(root / "data", 8, text_only=True)
    return root


def run(root, output, method="cia", options=None, **changes):
    model, encoder = prepared("llama", root, method)
    start = values(model)
    penalty = baseline(method, **(options or {})).penalty(model, encoder)
    data = load_conversations(root / "data" / "conversations.json")
    result = train(model, encoder, data, {**QUICK, "epochs": 2, **changes}, output, penalty=penalty)
    return start, result.history, values(model)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_at_0_it_is_lora_to_the_bit_and_at_1_it_stays_at_the_start(root, tmp_path):
    start, history, still = run(root, tmp_path / "1", options={"rule": "constant", "beta": 1}, max_steps=2)
    _, plain, trained = run(root, tmp_path / "lora", "lora", max_steps=2)
    _, other, last = run(root, tmp_path / "0", options={"rule": "constant", "beta": 0}, max_steps=2)
    assert same(still, start) and same(last, trained) and not same(trained, start)
    losses = [[entry["loss"] for entry in one] for one in (history, plain, other)]
    assert losses[0] == losses[1] == losses[2] and len(plain) == 2 and history[-1]["penalty"] == 0


@pytest.mark.parametrize("rule", ["paper", pytest.param("official", marks=pytest.mark.slow)])
def test_a_stopped_run_ends_as_if_it_had_not_been(root, tmp_path, rule, monkeypatch):
    options = {"rule": rule, "beta": 0.5}
    _, history, whole = run(root, tmp_path / "whole", options=options)
    save = KoreTrainer._save_optimizer_and_scheduler

    def stop(self, output_dir):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(KoreTrainer, "_save_optimizer_and_scheduler", stop)
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "cut", options=options, save_steps=1)
    assert (tmp_path / "cut" / "checkpoint-2" / "penalty.safetensors").is_file()
    _, resumed, trained = run(root, tmp_path / "cut", options=options, save_steps=1)
    assert resumed == history and same(trained, whole)
    assert 0 <= history[-1]["adaptive_beta"] <= 1
    _, again, loaded = run(root, tmp_path / "cut", options=options, save_steps=1)  # a finished run
    assert again == history and same(loaded, whole)


def test_what_is_wrong_is_said(root, tmp_path):
    for setting in ({"deepspeed": {"zero_optimization": {"stage": 1}}}, {"fsdp": "full_shard"}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))}: this method reads whole gradients"):
            run(root, tmp_path, **setting)
    averaging = Averaging()
    with pytest.raises(KoreError, match="no shadow yet"):
        averaging.finish()
    averaging.begin(Start(Toy(), None, [], 1, Path(), lambda: 0.0))
    with pytest.raises(KoreError, match=r"shadow.other of the checkpoint is no trained tensor"):
        averaging.load_state({"shadow.other": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"options.beta: .*less than or equal to 1"):
        baseline("cia", beta=2)
