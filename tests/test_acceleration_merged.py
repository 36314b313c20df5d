"""Merged mode in models: what it loses is measured, and a layer that would lose too much stays exact."""

from __future__ import annotations

import pytest
import torch

import kore
import kore_kernels as kk
from kore.acceleration import FusedLinear, accelerate, merged_error
from kore.errors import KoreError
from tests.acceleration_models import assert_as_close, assert_same_step, frozen_lora, kore_model, step
from tests.batches import make_batch


def set_B(model, scale):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=1.0, generator=generator).mul_(scale)


@pytest.fixture
def merged_calls(monkeypatch):
    calls, operation = [], kk.lora_fa_linear
    monkeypatch.setattr(
        kk, "lora_fa_linear", lambda *a, **k: calls.append(k.get("merged", False)) or operation(*a, **k)
    )
    return calls


def test_in_float32_every_layer_passes_and_nothing_is_lost(merged_calls):
    model = kore_model()
    theirs = step(model)
    done = accelerate(model, mode="merged")
    assert done.merged.keys() == set(done.accelerated) and not done.exact and not done.groups
    assert all(error.update < 1e-4 and not error.first_step for error in done.merged.values())
    assert "14 of the fused layers run merged, 0 exact" in str(done) and "largest error merged" in str(done)
    merged_calls.clear()
    assert_same_step(step(model), theirs, 3e-5)
    assert merged_calls == [True] * 14
    set_B(model, 0)
    done = accelerate(model, mode="merged")
    assert not done.exact and all(0 < e.update < 1e-2 and e.first_step for e in done.merged.values())
    assert not accelerate(model).merged
    merged_calls.clear()
    step(model)
    assert not any(merged_calls)


def test_bfloat16_runs_merged_when_the_update_has_grown(merged_calls):
    """B of zeros is measured as a first step would leave it: most of that is below the resolution of the weights."""
    model = frozen_lora(dtype=torch.bfloat16)
    set_B(model, 0)
    done = accelerate(model, mode="merged")
    assert set(done.exact) == set(done.accelerated) == set(done.merged)
    assert all("first step" in reason for reason in done.exact.values()) and "B is zero" in str(done)
    assert all(error.update > 0.1 for error in done.merged.values())
    merged_calls.clear()
    step(model)
    assert not any(merged_calls)
    means = []
    for scale in (1e-3, 1e-2, 1e-1):
        set_B(model, scale)
        found = merged_error(model)
        means.append(sum(error.update for error in found.values()) / len(found))
        assert all(error.output <= 2 * error.exact_output for error in found.values())
    assert means[0] > 5 * means[1] > 10 * means[2]
    exact = step(kore.decelerate(frozen_lora(dtype=torch.bfloat16)).float())
    model = frozen_lora(dtype=torch.bfloat16)
    theirs = step(model)
    done = accelerate(model, mode="merged")
    assert not done.exact
    merged_calls.clear()
    assert_as_close(step(model), theirs, exact)
    assert merged_calls == [True] * 14
    assert accelerate(model, mode="merged", gate=1e-9).exact.keys() == set(done.accelerated)


def test_the_error_is_that_of_the_weight_which_the_operation_forms():
    model = frozen_lora(dtype=torch.bfloat16)
    set_B(model, 3e-3)
    accelerate(model)
    name, layer = next((n, m) for n, m in model.named_modules() if type(m) is FusedLinear)
    W, A, B = (m.weight for m in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))
    s = layer.scaling["default"]
    with torch.no_grad():
        formed = kk.lora_fa_linear(torch.eye(W.shape[1], dtype=W.dtype), W, None, A, B, s, merged=True).T
        update = s * B.double() @ A.double()
        error = (formed.double() - W.double() - update).norm() / update.norm()
    state = torch.get_rng_state()
    found = merged_error(model)
    assert found[name].update == pytest.approx(error.item(), rel=0.02)
    assert len(found) == 14 and torch.equal(torch.get_rng_state(), state)


def test_under_autocast_to_another_dtype_a_merged_layer_runs_exact(merged_calls):
    """The weight that would be formed there is not the one that was measured."""
    model = frozen_lora()
    assert not accelerate(model, mode="merged").exact
    merged_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    assert merged_calls and not any(merged_calls)


def test_training_merged_in_bfloat16_follows_the_exact_run():
    """Float32 adapters on a bfloat16 base, from the B at which the gate opens."""

    def train(mode):
        model = frozen_lora(dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        set_B(model, 1e-2)
        assert not accelerate(model, mode=mode).exact
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batch, losses = make_batch("llama"), []
        for _ in range(40):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    exact, merged = train("exact"), train("merged")
    assert exact[-1] < exact[0] - 0.4
    assert merged == pytest.approx(exact, rel=5e-3)


def test_bad_arguments():
    model = frozen_lora()
    with pytest.raises(KoreError, match="mode must be one of exact, merged, got 'fast'"):
        accelerate(model, mode="fast")
    for mode, gate in (("exact", 0.1), ("merged", 0), ("merged", -1.0)):
        with pytest.raises(KoreError, match=f"got {gate!r} in mode '{mode}'"):
            accelerate(model, mode=mode, gate=gate)
