"""Layers that share a basis, computed together: the states a real model gets into."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import kore
import kore_kernels as kk
from kore.acceleration import FusedLinear, accelerate
from kore.acceleration.groups import rotations
from tests.acceleration_models import assert_as_close, assert_same_step, frozen_lora, kore_model, step
from tests.batches import KINDS, MODELS, make_batch

# For float32. KORE's h is small beside the inputs it comes from, for o_proj to 1e-3: PEFT's own error here is 1.2e-5.
TOLERANCE = 3e-5


@pytest.fixture
def calls(monkeypatch):
    """How often the operations for one layer and for several are called."""
    counts = {"lora_fa_linear": 0, "lora_fa_linears": 0}
    for name in counts:
        operation = getattr(kk, name)

        def counted(*arguments, _name=name, _operation=operation, **keywords):
            counts[_name] += 1
            return _operation(*arguments, **keywords)

        monkeypatch.setattr(kk, name, counted)
    return counts


def grouped(calls):
    """Whether each of two decoder layers ran as q + k + v, o, gate + up, down."""
    found, calls["lora_fa_linear"], calls["lora_fa_linears"] = dict(calls), 0, 0
    return found == {"lora_fa_linear": 4, "lora_fa_linears": 4}


class Attention(nn.Module):
    """Three projections; those of k and v read the context."""

    def __init__(self, d=24):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(d, d))

    def forward(self, x, context):
        return self.q_proj(x) * self.k_proj(context) + self.v_proj(context)


def attention(rank=4, d=24):
    """An Attention in float64 whose three A share their rows' space."""
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj"]
    model = kore.freeze_a(get_peft_model(Attention(d), LoraConfig(r=rank, lora_alpha=rank, target_modules=names)))
    model.double()
    basis = orthonormal(d, rank).mT
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(orthonormal(rank, rank) @ basis)
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def inputs(requires_grad=False):
    return torch.randn(3, 24, dtype=torch.float64, requires_grad=requires_grad)


def members(model):
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def held(model):
    """Outputs that wait in the groups."""
    groups = {id(m._fused_group): m._fused_group for m in members(model) if m._fused_group is not None}
    return [y for group in groups.values() if group._held for y in group._held.outputs.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kore_model_runs_grouped_with_the_loss_and_gradients_of_peft(kind, calls):
    model = kore_model(kind)
    if kind == "qwen_vl":
        assert all(m.bias is not None for name, m in model.named_modules() if name.endswith("self_attn.q_proj"))
    theirs = step(model, kind)
    done = accelerate(model)
    assert len(done.groups) == 4 and {len(group) for group in done.groups} == {2, 3}
    assert all(name in done.accelerated for group in done.groups for name in group)
    assert "q_proj + k_proj + v_proj, 2 times" in str(done) and "gate_proj + up_proj, 2 times" in str(done)
    assert_same_step(step(model, kind), theirs, TOLERANCE)
    assert grouped(calls) and not held(model)
    assert not accelerate(model, group=False).groups
    assert_same_step(step(model, kind), theirs, TOLERANCE)
    assert not grouped(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_to_float32_as_peft_is(kind, calls):
    model = kore_model(kind, dtype=torch.bfloat16)
    exact = step(copy.deepcopy(model).float(), kind)
    theirs = step(model, kind)
    assert len(accelerate(model).groups) == 4
    ours = step(model, kind)
    assert grouped(calls)
    assert_as_close(ours, theirs, exact)


def test_the_group_is_found_in_what_peft_loads(tmp_path, calls):
    """A float32 file gives its groups back; bfloat16 rounds each A, which then share a space only to 3e-3."""
    kore_model().save_pretrained(tmp_path / "float32")
    kore_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")

    def loaded(folder, dtype):
        model = PeftModel.from_pretrained(
            MODELS["llama"]().to(dtype), tmp_path / folder, is_trainable=True, autocast_adapter_dtype=False
        )
        return kore.freeze_a(model.to(dtype)).train()

    for file, dtype, groups in (
        ("float32", torch.float32, 4),
        ("float32", torch.bfloat16, 4),
        ("bfloat16", torch.bfloat16, 4),
        ("bfloat16", torch.float32, 0),
    ):
        model = loaded(file, dtype)
        theirs = step(model)
        assert len(accelerate(model).groups) == groups, (file, dtype)
        ours = step(model)
        if dtype == torch.float32:
            assert_same_step(ours, theirs, TOLERANCE)
        else:
            assert_as_close(ours, theirs, step(kore.decelerate(model).float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_taken_for_one_row_space(dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis, rows = torch.linalg.qr(random(200, 20)).Q.mT, torch.logspace(0, -3, 20, dtype=torch.float64)[:, None]
    As = [(rows * (torch.linalg.qr(random(20, 20)).Q @ basis)).to(dtype) for _ in range(2)]
    for R, A in zip(rotations(As), As):
        error = (R.double() @ As[0].double() - A.double()).norm() / A.double().norm()
        assert R.dtype == dtype and error <= torch.finfo(dtype).eps
    assert rotations([As[0], random(20, 200).to(dtype)])[1] is None
    tilted = (As[1].double() + 4 * torch.finfo(dtype).eps * As[1].double().norm() / 63 * random(20, 200)).to(dtype)
    assert rotations([As[0], tilted])[1] is None
    lower = As[0].clone()
    lower[3] = 0
    assert rotations([lower, As[1]])[1] is None
    assert rotations([torch.zeros_like(lower), As[1]])[1] is None


def test_random_a_are_not_grouped_and_square_ones_neither():
    assert not accelerate(frozen_lora()).groups
    assert not accelerate(attention(rank=24)).groups
    assert len(accelerate(attention(rank=23)).groups) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, kind, calls):
    model = kore_model(kind)
    theirs = step(model, kind)
    accelerate(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        assert_same_step(step(model, kind), theirs, TOLERANCE)
        assert calls["lora_fa_linears"] == 8 and calls["lora_fa_linear"] == 8
        calls.update(lora_fa_linears=0, lora_fa_linear=0)
    assert not held(model)


def test_inference_and_generation(calls):
    model = kore_model().eval()
    ids = make_batch("llama")["input_ids"]
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    accelerate(model)
    ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    assert torch.equal(ours.sequences, theirs.sequences) and not held(model)
    assert grouped(calls)  # in the prompt; the steps of three rows after it are PEFT's
    for a, b in zip(ours.logits, theirs.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        model(input_ids=ids)
    assert not held(model)


def test_adapters_switched_off_or_merged_between_two_members():
    model = accelerated_attention()
    x = inputs()
    expected = attention()(x, x)
    layer = model.base_model.model
    layer.q_proj(x)
    with model.disable_adapter():
        torch.testing.assert_close(layer.k_proj(x), layer.k_proj.base_layer(x), rtol=0, atol=0)
    layer.v_proj.merge()
    torch.testing.assert_close(layer(x, x), expected)
    layer.v_proj.unmerge()
    torch.testing.assert_close(layer(x, x), expected)
    assert not held(model)


def accelerated_attention():
    model = attention()
    assert len(accelerate(model).groups) == 1
    return model


def test_what_changes_between_two_members_is_never_passed_over():
    """Every output is that of the layer as it is at its call, whatever came in between."""
    model, reference = accelerated_attention(), attention()
    ours, theirs = model.base_model.model, reference.base_model.model
    x = inputs()

    def waiting():
        ours(x, x)
        ours.q_proj(x)
        assert len(held(model)) == 2

    def change(write):
        waiting()
        for layer in (ours, theirs):
            with torch.no_grad():
                write(layer.k_proj)
        torch.testing.assert_close(ours.k_proj(x), theirs.k_proj(x))

    def adapter(layer, name):
        return getattr(layer, name)["default"].weight

    def ones():
        return nn.Parameter(torch.ones(24, 24, dtype=torch.float64), requires_grad=False)

    change(lambda layer: adapter(layer, "lora_B").add_(1))
    change(lambda layer: adapter(layer, "lora_A").mul_(2))
    change(lambda layer: layer.base_layer.weight.mul_(2))
    change(lambda layer: layer.base_layer.bias.add_(1))
    change(lambda layer: setattr(layer.base_layer, "weight", ones()))
    waiting()
    x.mul_(2)
    torch.testing.assert_close(ours.k_proj(x), theirs.k_proj(x))
    waiting()
    with torch.no_grad():
        assert not ours.k_proj(x).requires_grad
    ours.float()
    x = x.float()
    waiting()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.k_proj(x).dtype == torch.bfloat16
    waiting()
    ours.k_proj.scaling["default"] = theirs.k_proj.scaling["default"] = 3.0
    torch.testing.assert_close(ours.k_proj(x), theirs.k_proj(x.double()).float(), rtol=1e-4, atol=1e-5)


def test_a_failed_pass_leaves_nothing_behind():
    model = accelerated_attention()
    layer = model.base_model.model
    good = inputs()
    expected = layer(good, good).detach()

    def fail(*_):
        raise RuntimeError("in the middle")

    x = inputs()
    handle = layer.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        layer(x, x)
    handle.remove()
    (y, _) = [weakref.ref(y) for y in held(model)]
    assert y() is not None
    del x
    gc.collect()
    assert y() is None and not held(model)
    for _ in range(2):
        torch.testing.assert_close(layer(good, good), expected)
    assert layer.q_proj._fused_group is not None


def test_one_member_after_the_other_with_a_backward_pass_each():
    layer, theirs = accelerated_attention().base_model.model, attention().base_model.model
    x = inputs(True)
    for name in ("q_proj", "k_proj", "v_proj", "k_proj", "q_proj"):
        ours, expected = (torch.autograd.grad(getattr(m, name)(x).square().sum(), x)[0] for m in (layer, theirs))
        torch.testing.assert_close(ours, expected)


def test_outputs_are_handed_out_once():
    model, reference = accelerated_attention(), attention()
    layer, theirs = model.base_model.model, reference.base_model.model
    x = inputs()
    first = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
    second = [layer.k_proj(x), layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
    assert not {id(y) for y in first} & {id(y) for y in second}
    for y, name in zip(second, ("k_proj", "q_proj", "k_proj", "v_proj")):
        torch.testing.assert_close(y, getattr(theirs, name)(x))


def test_two_passes_before_one_backward_and_accumulation(calls):
    def twice(model):
        model.zero_grad()
        losses = []
        for seed in range(2):
            batch = make_batch("llama", seed)
            losses.append(model(**{**batch, "labels": batch["input_ids"]}).loss)
        (losses[0] + losses[1]).backward()
        step_after = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        batch = make_batch("llama", 2)
        model(**{**batch, "labels": batch["input_ids"]}).loss.backward()
        return sum(losses).item(), {
            name: torch.stack([step_after[name], p.grad]) for name, p in model.named_parameters() if name in step_after
        }

    model = kore_model()
    theirs = twice(model)
    accelerate(model)
    assert_same_step(twice(model), theirs, TOLERANCE)
    assert calls["lora_fa_linears"] == 12


def test_other_values_of_a_are_noticed(calls):
    """Loaded in place, A of another adapter keep their groups; A without a common space end theirs."""
    model, other = kore_model(), kore_model(rank=5)
    accelerate(model)
    step(model)
    shuffled = {n: p[torch.randperm(5)] if "lora_A" in n else p for n, p in other.state_dict().items()}
    for state, stays in ((shuffled, True), (frozen_lora().state_dict(), False)):
        calls.update(lora_fa_linears=0, lora_fa_linear=0)
        model.load_state_dict(state)
        reference = kore_model()
        reference.load_state_dict(state)
        assert_same_step(step(model), step(reference), TOLERANCE)
        assert grouped(calls) == stays


def test_moved_models(calls):
    model = kore_model()
    accelerate(model)
    step(model)
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        calls.update(lora_fa_linears=0, lora_fa_linear=0)
        ours = step(model)
        # In float64 the A are still those that were rounded to float32, which share a space to 4e-8 only.
        assert grouped(calls) == (dtype == torch.bfloat16)
        plain = kore.decelerate(copy.deepcopy(model))
        if dtype == torch.float64:
            assert_same_step(ours, step(plain), 1e-9)
        else:
            assert_as_close(ours, step(plain), step(plain.float()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_groups_of_their_own(how, calls):
    model = kore_model()
    accelerate(model)
    theirs = step(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    originals = {id(member) for member in members(model)}
    groups = {id(m._fused_group): m._fused_group for m in members(twin) if m._fused_group}
    assert len(groups) == 4 and not any(id(m) in originals for g in groups.values() for m in g.members)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    calls.update(lora_fa_linears=0, lora_fa_linear=0)
    assert_same_step(step(twin), theirs, 1e-6)
    assert grouped(calls)
    alone = copy.deepcopy(members(model)[0])
    x = torch.randn(3, 48)
    torch.testing.assert_close(alone(x), members(model)[0](x))
    assert copy.copy(members(model)[0])(x).shape == (3, 48)


@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_layers_with_other_inputs_are_dissolved(checkpointed, calls):
    """Under checkpointing not before the repeated passes are over: they have to repeat what the first ones did."""
    model, reference = accelerated_attention(), attention()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (model, reference)]
    x, context = inputs(True), inputs(True)

    def run(model, optimizer):
        def layer(x, context):
            return model(x.sin(), context.sin())

        y = x
        for _ in range(3):
            y = y + (
                layer(y, context) if checkpointed is None else checkpoint(layer, y, context, use_reentrant=checkpointed)
            )
        x.grad = context.grad = None
        optimizer.zero_grad()
        y.sin().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        optimizer.step()
        return [y.detach(), x.grad.clone(), context.grad.clone(), *gradients]

    for _ in range(3):
        for ours, theirs in zip(run(model, optimizers[0]), run(reference, optimizers[1])):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert all(member._fused_group is None for member in members(model))
    calls.update(lora_fa_linears=0)
    run(model, optimizers[0])
    assert not calls["lora_fa_linears"]


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell one checkpointed region from another",
)
def test_members_in_checkpointed_regions_of_their_own():
    model, reference = accelerated_attention().base_model.model, attention().base_model.model
    x = inputs(True)
    for _ in range(2):
        results = []
        for layer in (model, reference):
            projections = (layer.q_proj, layer.k_proj, layer.v_proj)
            parts = [checkpoint(lambda x, p=p: p(x).sin(), x, use_reentrant=False) for p in projections]
            (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in parts), x)
            results.append(gradient)
        torch.testing.assert_close(*results)


def test_selective_checkpointing_counts_the_same_operations():
    """What a group computes for itself must not be among the operations that the policy saves by their order."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda ctx, op, *a, **k: (
                CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE
            )
        )

    model, reference = accelerated_attention(), attention()
    square = torch.randn(24, 24, dtype=torch.float64) / 5
    x = inputs(True)
    results = []
    for m in (model, reference):
        m.double()

        def layer(x, m=m):
            x = x @ square
            return (m(x, x) @ square).sin()

        y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
        results.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_an_a_that_is_new_at_every_call_ends_the_group():
    """As with wrappers that put a view of one flat parameter into each pass."""
    model = accelerated_attention()
    layer, x = model.base_model.model, inputs()
    expected = layer(x, x)
    for _ in range(12):
        A = layer.k_proj.lora_A["default"]
        A.weight = nn.Parameter(A.weight.detach().clone(), requires_grad=False)
        torch.testing.assert_close(layer(x, x), expected)
    assert layer.k_proj._fused_group is None


def test_an_adapter_with_another_name(calls):
    """Each adapter has its own A; only those with one row space are computed together."""
    model = attention()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    kore.freeze_a(model)
    x = inputs()
    model.set_adapter("default")
    expected = model(x, x)
    model.set_adapter("other")
    other = model(x, x)
    model.set_adapter("default")
    assert len(accelerate(model).groups) == 1
    for _ in range(2):
        model.set_adapter("default")
        torch.testing.assert_close(model(x, x), expected)
        model.set_adapter("other")
        torch.testing.assert_close(model(x, x), other)
    assert calls == {"lora_fa_linears": 2, "lora_fa_linear": 6}


def test_an_adapter_that_changes_some_members_only():
    """The others run as PEFT runs them, and the group is there again for the adapter that it was made for."""
    model = attention()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    kore.freeze_a(model)
    x = inputs()
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = model(x, x)
    assert len(accelerate(model).groups) == 1
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x, x), expected[name])
    model.delete_adapter("other")
    torch.testing.assert_close(model(x, x), expected["default"])


def test_data_parallel_replicas_run_singly():
    model = accelerated_attention()
    x = inputs()
    expected = model(x, x)
    layer = model.base_model.model
    replica = layer.q_proj._replicate_for_data_parallel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replica._fused_group.output(replica, x) is None
    torch.testing.assert_close(model(x, x), expected)
