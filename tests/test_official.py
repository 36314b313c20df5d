"""The official linear layer under its own names: plain, fused, and inside models made of remote code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kore
from kore.acceleration import Fused
from kore.official import CovSVDLinear
from kore.official.linear import plain_forward
from tests.batches import KINDS, MODELS, make_batch
from tests.official_models import RemoteLinear, officialise
from tests.tiny import tiny_llama

DTYPES = [torch.float32, torch.bfloat16]


def layer(cls=CovSVDLinear, bias=True, dtype=torch.float32, trained_bias=False):
    torch.manual_seed(0)
    new = cls(24, 40, 7, bias)
    new.weight_residual.data.normal_(std=0.1)
    new.BLinear.weight.requires_grad = False
    if bias:
        new.ALinear.bias.requires_grad = trained_bias
    return new.to(dtype)


def step(module, x, run=None):
    """Output and gradients of a module, float64."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = (run or module)(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    gradients = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach().double(), "x": x.grad.double(), **gradients}


def assert_close(ours, theirs, exact):
    """No further from ``exact`` than twice what the plain layer is."""
    assert ours.keys() == theirs.keys()
    for name, true in exact.items():
        error, plain_error = (float((found[name] - true).norm() / true.norm()) for found in (ours, theirs))
        assert error <= 2 * plain_error + 1e-7, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "trained_bias"), [(False, False), (True, False), (True, True)])
def test_the_layer_is_as_exact_as_the_official_one(dtype, bias, trained_bias):
    ours = layer(CovSVDLinear, bias, dtype, trained_bias)
    theirs = layer(RemoteLinear, bias, dtype, trained_bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 11, 24, dtype=dtype)
    assert_close(step(ours, x), step(theirs, x), step(copy.deepcopy(theirs).double(), x.double()))
    assert torch.equal(plain_forward(ours, x), theirs(x))
    assert ("ALinear.bias" in step(ours, x)) == trained_bias


@pytest.mark.parametrize("trained_bias", [False, True])
def test_h_is_all_the_layer_keeps_of_its_input(trained_bias):
    module, saved = layer(trained_bias=trained_bias), []
    x = torch.randn(33, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    kept = {tuple(t.shape) for t in saved if t.data_ptr() not in {p.data_ptr() for p in module.parameters()}}
    assert kept and all(shape[0] == 33 and shape[1] < 24 for shape in kept)


def test_a_trained_a_gets_the_gradient_of_the_plain_layer():
    module = layer()
    module.BLinear.weight.requires_grad = True
    x = torch.randn(11, 24)
    ours, theirs = step(module, x), step(module, x, lambda x: plain_forward(module, x))
    assert "BLinear.weight" in ours and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_autocast_and_gradient_checkpointing():
    module, x = layer(trained_bias=True), torch.randn(11, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(module, x), step(module, x, lambda x: plain_forward(module, x))
        assert module(x).dtype == torch.bfloat16
    assert_close(ours, theirs, step(copy.deepcopy(module).double(), x.double()))
    again = step(module, x, lambda x: checkpoint(module, x, use_reentrant=False))
    assert all(torch.equal(again[name], value) for name, value in step(module, x).items())


def test_hooks_inside_the_layer_still_run():
    module, seen = layer(), []
    module.BLinear.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(2, 24))
    assert seen


def loss_and_gradients(model, kind):
    batch = make_batch(kind)
    model.zero_grad()
    loss = model(**{**batch, "labels": batch["input_ids"]}).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_takes_remote_code_and_gives_it_back(kind):
    model = officialise(MODELS[kind]()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, gradients = loss_and_gradients(model, kind)
    done = kore.accelerate(model)
    assert not done.left and sum(isinstance(m, RemoteLinear) for m in model.modules()) == len(done.accelerated)
    ours = loss_and_gradients(model, kind)
    assert ours[0] == pytest.approx(loss, rel=1e-5) and ours[1].keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert kore.decelerate(model) is model
    assert {type(m) for m in model.modules() if hasattr(m, "weight_residual")} == {RemoteLinear}
    assert loss_and_gradients(model, kind)[0] == loss


def test_accelerate_says_why_it_leaves_a_layer():
    model = officialise(tiny_llama())
    layers = model.model.layers
    layers[0].self_attn.q_proj.BLinear.weight.requires_grad = True
    layers[0].self_attn.k_proj.weight_residual.requires_grad = True
    layers[0].self_attn.v_proj.BLinear = nn.Sequential(layers[0].self_attn.v_proj.BLinear)
    done = kore.accelerate(model)
    reasons = {name.rpartition(".")[2]: reason for name, reason in done.left.items()}
    assert reasons.keys() == {"q_proj", "k_proj", "v_proj"}
    assert "A (BLinear) is trained" in reasons["q_proj"] and "weight_residual" in reasons["k_proj"]
    assert not isinstance(layers[0].self_attn.q_proj, Fused) and isinstance(layers[1].self_attn.q_proj, Fused)


class Scaled(RemoteLinear):
    scale = 2.0

    def forward(self, input):
        return self.scale * self.ALinear(self.BLinear(input)) + F.linear(input, self.weight_residual)


def test_a_class_of_that_shape_with_another_formula_is_left_alone():
    done = kore.accelerate(officialise(tiny_llama(), Scaled))
    assert not done.accelerated and set(done.left.values()) == {"its forward is not that of the official module"}


def test_the_import_alone_makes_a_model_run_fused():
    theirs = loss_and_gradients(officialise(tiny_llama()), "llama")
    ours = loss_and_gradients(officialise(tiny_llama(), CovSVDLinear), "llama")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_compiles_without_a_break():
    module, x = layer(), torch.randn(11, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), rtol=1e-6, atol=1e-6)
