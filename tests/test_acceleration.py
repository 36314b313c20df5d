"""Fused LoRA layers inside real models, beside PEFT's own forward and backward."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import kore
from kore.acceleration import FusedLinear, accelerate, decelerate
from kore.errors import KoreError
from tests.acceleration_models import assert_as_close, assert_same_step, frozen_lora, step
from tests.batches import KINDS, MODELS, make_batch


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_peft(kind):
    model = frozen_lora(kind)
    theirs = step(model, kind)
    done = accelerate(model)
    assert not done.left and len(done.accelerated) == len(kore.models.language_model_linears(MODELS[kind]()))
    assert_same_step(step(model, kind), theirs, 1e-5)


def test_bfloat16_is_as_close_to_float32_as_peft_is():
    exact = step(frozen_lora())
    model = frozen_lora(dtype=torch.bfloat16)
    theirs = step(model)
    accelerate(model)
    assert_as_close(step(model), theirs, exact)


def test_autocast_and_a_float32_adapter_on_a_bfloat16_base():
    model = frozen_lora()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        accelerate(model)
        assert_same_step(step(model), theirs, 0.05)
    mixed = frozen_lora(dtype=torch.bfloat16)
    for name, parameter in mixed.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    theirs = step(mixed)
    accelerate(mixed)
    assert_same_step(step(mixed), theirs, 0.05)


def test_gradient_checkpointing():
    model = frozen_lora()
    theirs = step(model)
    accelerate(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_step(step(model), theirs, 1e-5)


def test_only_h_is_saved():
    model = frozen_lora(target_modules=["down_proj"])
    layer = next(m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    x = torch.randn(3, 40, layer.in_features, requires_grad=True)

    kept = []
    accelerate(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    weights = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    (h,) = (tensor for tensor in kept if tensor.data_ptr() not in weights)
    assert h.shape == (120, 16)  # rank 5, padded


def test_training_goes_on_with_the_other_form():
    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(model, optimizer, steps):
        for _ in range(steps):
            step(model)
            optimizer.step()

    plain, switching = frozen_lora(), frozen_lora()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (plain, switching)
    ]
    train(plain, optimizers[0], 4)
    accelerate(switching)
    train(switching, optimizers[1], 2)
    state = switching.state_dict()
    other = frozen_lora()
    other.load_state_dict(state)
    optimizer = adamw(other)
    optimizer.load_state_dict(optimizers[1].state_dict())
    train(other, optimizer, 2)
    for (name, ours), theirs in zip(other.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_decelerate_gives_the_model_back():
    model = frozen_lora()
    classes = [type(module) for module in model.modules()]
    keys, theirs = list(model.state_dict()), step(model)
    accelerate(model)
    assert list(model.state_dict()) == keys and any(type(m) is FusedLinear for m in model.modules())
    assert decelerate(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert_same_step(step(model), theirs, 0)


def test_a_class_that_was_changed_again_is_not_taken_away():
    """As fully_shard does with the layers it is called on."""
    model = frozen_lora()
    accelerate(model)
    layer = next(module for module in model.modules() if type(module) is FusedLinear)
    layer.__class__ = type("FSDPFusedLinear", (FusedLinear,), {})
    with pytest.raises(KoreError, match="got a FSDPFusedLinear"):
        decelerate(model)
    assert sum(type(module) is FusedLinear for module in model.modules()) == 13


def test_weights_that_are_offloaded_run_as_peft_does():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = frozen_lora().eval()
    with torch.no_grad():
        batch = make_batch("llama")
        expected = model(**batch).logits
        accelerate(model)
        cpu_offload(model)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        assert not accelerate(model).accelerated
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        remove_hook_from_submodules(model)
        assert len(accelerate(model).accelerated) == 14
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_is_said():
    def reasons(model):
        done = accelerate(model)
        assert not done.accelerated and all(reason in str(done) for reason in done.left.values())
        return " ".join(set(done.left.values()))

    trained = frozen_lora()
    for name, parameter in trained.named_parameters():
        parameter.requires_grad = parameter.requires_grad or "lora_A" in name
    assert "kore.freeze_a" in reasons(trained)
    replaced = frozen_lora(target_modules=["q_proj"])
    for module in replaced.modules():
        if hasattr(module, "lora_A"):
            module.forward = module.forward
    assert "replaced" in reasons(replaced)
    odd = frozen_lora(lora_dropout=0.1)
    for module in odd.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.AlphaDropout(0.1)
    assert "AlphaDropout" in reasons(odd)
    assert "DoRA" in reasons(frozen_lora(use_dora=True))
    two = frozen_lora()
    two.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    assert "2 active adapters" in accelerate(two).left[next(iter(accelerate(two).left))]
    embedding = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert "Embedding" in reasons(embedding)


def test_states_that_are_not_covered_run_as_peft_does():
    model = frozen_lora()
    batch = make_batch("llama")

    def logits():
        with torch.no_grad():
            return model(**batch).logits

    adapted = logits()
    with model.disable_adapter():
        base = logits()
    accelerate(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(), base, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(logits(), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    calls = []
    layer = next(m for m in model.modules() if type(m) is FusedLinear)
    handle = layer.lora_B["default"].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(), adapted, rtol=1e-4, atol=1e-5)
    assert calls
    handle.remove()


def test_compiles_without_a_break():
    model = frozen_lora()
    accelerate(model)
    layer = next(m for m in model.modules() if type(m) is FusedLinear)
    x = torch.randn(2, 7, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs)
