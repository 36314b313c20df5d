"""What an accelerated model keeps for the backward pass, and the peak of a training step."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

import kore
from kore.acceleration import accelerate, decelerate
from kore.adapter.rank import resolve_rank
from kore.models import language_model_linears
from tests.acceleration_models import kore_model
from tests.tiny import tiny_llama


def saved_bytes(run, apart_from):
    """Bytes of the distinct storages that ``run`` saves for its backward pass, without those of some tensors."""
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.update({storage(t): t}) or t, lambda t: t):
        kept = run()
    known = {storage(tensor) for tensor in apart_from}
    assert kept.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in found.items() if address not in known)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [True, False])
def test_a_decoder_layer_keeps_what_a_frozen_one_does_and_h(dtype, group):
    """Of q, k and v one h, as of gate and up; the R of a group belong to the model as its parameters do."""
    model = kore_model(dtype=dtype, rank=7)
    decoder = model.base_model.model.model
    x = torch.randn(2, 40, 48, dtype=dtype, requires_grad=True)
    places = decoder.rotary_emb(x, torch.arange(40)[None])

    def run():
        y = decoder.layers[0](x * 1, position_embeddings=places)
        return y[0] if isinstance(y, tuple) else y

    constants = [*model.parameters(), *places]
    with model.disable_adapter():
        frozen = saved_bytes(run, constants)
    plain = saved_bytes(run, constants)
    accelerate(model, group=group)
    run()  # a group may compute its R in its first pass
    groups = {id(m._fused_group): m._fused_group for m in model.modules() if getattr(m, "_fused_group", None)}
    constants += [R for g in groups.values() for basis in g._bases.values() for R in basis.Rs]
    fused = saved_bytes(run, constants)
    h = 2 * 40 * 16 * dtype.itemsize  # rank 7, padded
    assert fused == frozen + (4 if group else 7) * h
    decelerate(model)
    assert saved_bytes(run, constants) == plain


def peak_bytes(run):
    """The most memory that is allocated at one time on top of what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    now = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_the_peak_is_that_of_the_allocations():
    def run():
        first = torch.ones(1000)
        first = torch.ones(2000)
        return first.sum()

    assert 12000 <= peak_bytes(run) <= 13000


def training_step(model):
    """Forward, backward, AdamW; the optimizer's state is there already."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(20, 300, (2, 256), generator=torch.Generator().manual_seed(0))

    def run():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    return run


def test_a_training_step_peaks_below_lora_with_as_many_parameters():
    """KORE at rank match-lora-R beside LoRA at rank R, as 235 beside 128 for LLaVA: the trained sizes are alike."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    base = tiny_llama(**sizes)
    names = language_model_linears(base)
    rank = resolve_rank(base, names, "match-lora-8")
    lora = get_peft_model(base, LoraConfig(r=8, target_modules=names)).train()
    fixed = kore.freeze_a(get_peft_model(tiny_llama(**sizes), LoraConfig(r=rank, target_modules=names))).train()
    assert len(accelerate(fixed).accelerated) == len(names)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (lora, fixed)]
    assert 0.9 * trained[0] <= trained[1] <= trained[0]
    assert peak_bytes(training_step(fixed)) < 0.85 * peak_bytes(training_step(lora))
