"""Fused LoRA layers in models that accelerate spreads over devices or offloads."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules

import kore
import kore_kernels as kk
from tests import acceleration_models
from tests.acceleration_models import assert_same_step, frozen_lora, kore_model, step
from tests.batches import MODELS, make_batch

LAYERS = 14


@pytest.fixture
def calls(monkeypatch):
    """Grows with every fused call."""
    made, fused = [], kk.lora_fa_linear
    monkeypatch.setattr(kk, "lora_fa_linear", lambda *args, **kwargs: made.append(1) or fused(*args, **kwargs))
    return made


def spread_lora(monkeypatch, removed=False):
    """frozen_lora on a base with a hook on every module, as ``device_map="auto"`` makes it on several GPUs."""
    base = dispatch_model(MODELS["llama"](), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(base.model.layers[0].mlp.up_proj)
    if removed:  # leaves the bound method on the module
        remove_hook_from_submodules(base)
        assert "forward" in vars(base.model.layers[0].mlp.up_proj)
    monkeypatch.setitem(acceleration_models.MODELS, "llama", lambda: base)
    return frozen_lora()


@pytest.mark.parametrize("removed", [False, True])
def test_a_base_spread_over_devices_runs_fused(removed, monkeypatch, calls):
    model = spread_lora(monkeypatch, removed)
    theirs = step(model)
    assert len(kore.accelerate(model).accelerated) == LAYERS
    assert_same_step(step(model), theirs, 1e-5)
    assert len(calls) == LAYERS


@pytest.mark.parametrize("change", ["offload", "io_same_device", "below", "above"])
def test_a_forward_pass_that_does_more_is_called(change, monkeypatch, calls):
    model = spread_lora(monkeypatch)
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    hook, called = base._hf_hook, []
    if change in ("offload", "io_same_device"):
        monkeypatch.setattr(hook, change, True)
        monkeypatch.setattr(hook, "pre_forward", lambda module, *args, **kwargs: (args, called.append(1) or kwargs))
        monkeypatch.setattr(hook, "post_forward", lambda module, output: output)
    else:
        name = "forward" if change == "above" else "_old_forward"
        forward = getattr(base, name)
        monkeypatch.setattr(base, name, lambda *args: called.append(1) or forward(*args))
    done = kore.accelerate(model)
    assert len(done.accelerated) == LAYERS - 1 and "forward pass was replaced" in str(done)
    step(model)
    assert len(calls) == LAYERS - 1 and len(called) == 1


@pytest.mark.parametrize("make", [frozen_lora, kore_model])
@pytest.mark.parametrize("first", ["accelerate", "offload"])
def test_an_offloaded_model_runs_as_peft_does(make, first, calls):
    model = make()
    batch = make_batch("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        if first == "accelerate":
            kore.accelerate(model)
        cpu_offload(model, execution_device="cpu")
        if first == "offload":
            assert "forward pass was replaced" in str(kore.accelerate(model))
        assert model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.is_meta
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    assert not calls
