"""Dropout on the adapter's input, in the layers of a model."""

from __future__ import annotations

import pytest
import torch

import kore
from kore.acceleration import FusedLinear, accelerate
from kore_kernels.lora_fa_linear.dropout import keep
from tests.acceleration_models import assert_same_step, frozen_lora, kore_model, step

P = 0.25


def layer_with_dropout():
    model = frozen_lora(lora_dropout=P)
    assert not accelerate(model).left
    return next(module for module in model.modules() if type(module) is FusedLinear)


def by_definition(layer, x, g, seed):
    """y, dx and dB in float64 for the mask of ``seed``."""
    W, A, B = (t.weight.detach().double() for t in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))
    s, rows = layer.scaling["default"], x.detach().double().flatten(0, -2)
    g = g.double().flatten(0, -2)
    mask = keep(seed, P, 0, *rows.shape) / (1 - P)
    h = (mask * rows) @ A.T
    y = rows @ W.T + s * h @ B.T
    return y, g @ W + s * mask * (g @ B @ A), s * g.T @ h


def test_outputs_and_gradients_are_those_of_the_mask():
    layer = layer_with_dropout()
    x = torch.randn(2, 19, layer.in_features, requires_grad=True)
    g = torch.randn(2, 19, layer.out_features)
    torch.manual_seed(7)
    y = layer(x)
    dx, dB = torch.autograd.grad(y, [x, layer.lora_B["default"].weight], g)
    torch.manual_seed(7)
    expected = by_definition(layer, x, g, torch.randint(2**63 - 1, (1,)))
    for ours, true in zip((y, dx, dB), expected):
        torch.testing.assert_close(ours.double().reshape(true.shape), true, rtol=1e-5, atol=1e-5)


def test_the_mean_over_masks_is_the_layer_without():
    layer = layer_with_dropout()
    x = torch.randn(20, layer.in_features)
    mean = torch.stack([layer(x) - layer.base_layer(x) for _ in range(600)]).mean(0)
    update = layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x))
    # One mask changes the update by sqrt(P / (1 - P)) of what it is built from; 600 of them by a 24th of that.
    assert (mean - update).norm() <= 0.1 * update.norm()
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), update, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_masks(reentrant):
    model = frozen_lora(lora_dropout=P)
    accelerate(model)
    model.enable_input_require_grads()

    def seeded():
        torch.manual_seed(3)
        return step(model)

    without = seeded()
    assert abs(step(model)[0] - without[0]) > 1e-6
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_step(seeded(), without, 1e-6)


def test_a_model_with_dropout_is_that_of_peft_in_eval_mode():
    model = frozen_lora(lora_dropout=P).eval()
    theirs = step(model)
    accelerate(model)
    assert_same_step(step(model), theirs, 1e-5)


def test_layers_with_dropout_are_not_grouped():
    """Each layer has a mask of its own, so they share no x Aᵀ."""
    model = kore_model()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(P)
    assert not accelerate(model).groups
    plain = kore_model()
    assert len(accelerate(plain).groups) == 4
    theirs = step(plain)
    for module in plain.modules():
        if isinstance(module, FusedLinear):
            module.lora_dropout["default"] = torch.nn.Dropout(P)
    assert abs(step(plain)[0] - theirs[0]) > 1e-6
    assert_same_step(step(plain.eval()), theirs, 1e-5)


def test_compiles_with_dropout():
    layer = layer_with_dropout()
    x = torch.randn(2, 7, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = compiled(x)
    assert not torch.equal(first, compiled(x))
    torch.autograd.grad(first.square().sum(), [x, layer.lora_B["default"].weight])


def test_the_seed_is_all_that_is_kept_of_a_mask():
    layer = layer_with_dropout()
    x = torch.randn(3, 40, layer.in_features, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    weights = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    shapes = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in weights)
    assert shapes == [(1,), (120, 16)]


def test_dropout_and_merged_mode_do_not_go_together():
    model = frozen_lora(lora_dropout=P)
    done = kore.accelerate(model, mode="merged", gate=1e9)
    assert set(done.exact) == set(done.accelerated) and "dropout" in str(done)
    assert step(model)[1]
