"""Models with a frozen A, and what a training step makes of them."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model

import kore
from tests.batches import MODELS, make_batch, make_batches


def frozen_lora(kind="llama", dtype=torch.float32, **config):
    """A PEFT model with a frozen A and a B that is not zero."""
    torch.manual_seed(0)
    names = kore.models.language_model_linears(base := MODELS[kind]())
    options = {"r": 5, "lora_alpha": 10, "target_modules": names, **config}
    model = kore.freeze_a(get_peft_model(base, LoraConfig(**options)))
    return _trained(model).to(dtype).train()


@functools.cache
def _covariance(kind):
    return kore.capture_covariance(MODELS[kind](), make_batches(kind), progress=False)


def kore_model(kind="llama", dtype=torch.float32, rank=5):
    """A KORE adapter, whose layers with one input share a basis, and a B that is not zero."""
    model = kore.get_kore_model(MODELS[kind](), _covariance(kind), kore.KoreConfig(rank=rank), progress=False)
    return _trained(model).to(dtype).train()


def _trained(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def step(model, kind="llama"):
    """Loss of one batch, its gradients by name in float64."""
    batch = make_batch(kind)
    model.zero_grad()
    loss = model(**{**batch, "labels": batch["input_ids"]}).loss
    loss.backward()
    return loss.double().item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs, tolerance):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


def assert_as_close(ours, theirs, exact):
    """Gradients in bfloat16 are as far from those of float32 as PEFT's are: together, and none is much further."""
    errors = []
    for name, true in exact[1].items():
        error, peft_error = ((found[1][name] - true).norm() / true.norm() for found in (ours, theirs))
        assert error <= 2 * peft_error + 0.01, name
        errors.append((error, peft_error))
    mean, peft_mean = torch.tensor(errors).mean(dim=0)
    assert mean <= 1.3 * peft_mean + 0.003
