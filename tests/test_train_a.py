"""A trained: the paper's ablation as a stock PEFT LoRA of rank 2r, one half of it constant."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kore
from kore.adapter import HalfFrozenLinear, KoreConfig, freeze_a, get_kore_model, load_kore_model, save_adapter
from kore.adapter.halves import freeze_halves, start_of_b
from kore.capture import capture_covariance
from kore.data import Encoder, load_conversations
from kore.errors import ConfigError, KoreError, ModelError
from kore.models import named_linears
from tests.batches import MODELS, logits, make_batch, make_batches
from tests.tiny import save_tiny, tiny_conversations

RANK = 5


@pytest.fixture(scope="module")
def covariances():
    return {
        kind: capture_covariance(MODELS[kind](), make_batches(kind, 4), progress=False) for kind in ("llama", "llava")
    }


def make(covariances, kind="llama", model=None, **changes):
    model = MODELS[kind]() if model is None else model
    config = KoreConfig(**{"rank": RANK, "train_a": True, **changes})
    return get_kore_model(model, covariances[kind], config, progress=False)


def halves(model):
    """The constant halves, by the name of their parameter."""
    return {
        f"{name}.weight": (module.weight[module.trained :] if module.dim == 0 else module.weight[:, module.trained :])
        .detach()
        .clone()
        for name, module in model.named_modules()
        if isinstance(module, HalfFrozenLinear)
    }


def train(model, steps=3, lr=1e-2, optimizer=torch.optim.AdamW, **options):
    """Steps over everything that says it is trainable."""
    model.train()
    chosen = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    for step in range(steps):
        model(**make_batch("llama", seed=step)).loss.backward()
        chosen.step()
        chosen.zero_grad()
    return model.eval()


def assert_same(found, expected):
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class PaperLinear(nn.Module):
    """W0' + B A with W0' = W0 − B0 A0 and both factors trained, as the paper writes it."""

    def __init__(self, linear, A0, B0):
        super().__init__()
        self.residual = linear.weight.detach() - B0 @ A0
        self.A, self.B = nn.Parameter(A0.clone()), nn.Parameter(B0.clone())

    def forward(self, x):
        return F.linear(x, self.residual) + F.linear(F.linear(x, self.A), self.B)


def test_fifty_steps_are_those_of_the_residual_form(covariances):
    model = make(covariances, model=MODELS["llama"]().double())
    paper = MODELS["llama"]().double().requires_grad_(False)
    layers = {name: model.get_base_model().get_submodule(name) for name in model.kore_info["null_spaces"]}
    for name, layer in layers.items():
        A0, B0 = layer.lora_A["default"].weight[:RANK].detach(), layer.lora_B["default"].weight[:, :RANK].detach()
        parent, _, leaf = name.rpartition(".")
        setattr(paper.get_submodule(parent), leaf, PaperLinear(paper.get_submodule(name), A0, B0))
    train(model, 50, 2e-3, weight_decay=0.0)
    train(paper, 50, 2e-3, weight_decay=0.0)
    for name, layer in layers.items():
        other, A, B = paper.get_submodule(name), layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (other.A - A[RANK:]).abs().max() > 1e-3 and (other.B + B[:, RANK:]).abs().max() > 1e-3
        torch.testing.assert_close(A[:RANK], other.A, rtol=0, atol=1e-10)
        torch.testing.assert_close(B[:, :RANK], other.B, rtol=0, atol=1e-10)
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        torch.testing.assert_close(weight, other.residual + other.B @ other.A, rtol=0, atol=1e-10)


def test_b_starts_as_what_the_paper_takes_out_of_w0(covariances):
    model, plain = make(covariances), MODELS["llama"]()
    linears = named_linears(plain)
    for name in model.kore_info["null_spaces"]:
        layer, W0 = model.get_base_model().get_submodule(name), linears[name].weight.detach().double()
        U = kore.null_space(covariances["llama"][name], RANK).basis
        A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        torch.testing.assert_close(B[:, :RANK] @ A[:RANK], W0 @ U @ U.T, rtol=0, atol=2e-6)
        assert torch.equal(A[:RANK], A[RANK:]) and torch.equal(B[:, :RANK], -B[:, RANK:])
    generator = torch.Generator().manual_seed(0)
    W0, basis = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((9, 30), (30, 4)))
    Us, S, Vh = torch.linalg.svd(W0 @ (U := torch.linalg.qr(basis).Q) @ U.T, full_matrices=False)
    A = S[:4].sqrt()[:, None] * Vh[:4]
    torch.testing.assert_close(start_of_b(W0, A), Us[:, :4] * S[:4].sqrt(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_it_starts_where_the_model_is_and_loads_in_stock_peft(covariances, kind, tmp_path):
    from peft import PeftModel

    batch, model = make_batch(kind), make(covariances, kind, modules_to_save="auto").eval()
    torch.testing.assert_close(logits(model, batch), logits(MODELS[kind](), batch), rtol=0, atol=5e-6)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            half = p.data[:RANK] if ".lora_A." in name else p.data[:, :RANK] if ".lora_B." in name else p.data
            half.add_(torch.randn(half.shape, generator=generator), alpha=0.05)
    expected, constant = logits(model, batch), halves(model)
    assert (expected - logits(MODELS[kind](), batch)).abs().max() > 1e-2
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 2 * RANK
    stock = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "a").eval()
    torch.testing.assert_close(logits(stock, batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(stock.merge_and_unload(), batch), expected, rtol=0, atol=1e-5)
    loaded = load_kore_model(MODELS[kind](), tmp_path / "a", trainable=True).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=0)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert_same(halves(loaded), constant)
    if kind == "llama":
        assert_same(halves(train(loaded, weight_decay=0.0)), constant)
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / "kore.json").read_bytes() == (tmp_path / "b" / "kore.json").read_bytes()


def set_adapter(model, tmp_path):
    model.set_adapter("default")


def reload_as_the_trainer_does(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    model.load_adapter(tmp_path / "checkpoint", model.active_adapter, is_trainable=True)


def flags_by_hand(model, tmp_path):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def disable_and_enable(model, tmp_path):
    with model.disable_adapter():
        pass


def checkpointing(model, tmp_path):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def freeze_again(model, tmp_path):
    assert freeze_halves(model) is model


@pytest.mark.parametrize(
    "act",
    [set_adapter, reload_as_the_trainer_does, flags_by_hand, disable_and_enable, checkpointing, freeze_again],
    ids=lambda act: act.__name__,
)
def test_the_halves_are_constant_to_the_bit_after(act, covariances, tmp_path):
    model = make(covariances)
    constant, parameters = halves(model), {name: id(p) for name, p in model.named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    act(model, tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    train(model, weight_decay=0.0)
    assert_same(halves(model), constant)
    moved = {name: p for name, p in model.named_parameters() if not torch.equal(p, start.get(name, p))}
    assert moved.keys() == start.keys() and len(moved) == 2 * 14


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad"])
def test_other_optimizers_leave_them_too(covariances, optimizer):
    model = make(covariances, targets=["down_proj"])
    constant = halves(model)
    assert_same(halves(train(model, optimizer=getattr(torch.optim, optimizer), lr=1e-3)), constant)


def test_copies_and_autocast(covariances):
    model = copy.deepcopy(make(covariances))
    constant = halves(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**make_batch("llama")).loss
    loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, HalfFrozenLinear):
            trained, rest = module.weight.grad.tensor_split([module.trained], dim=module.dim)
            assert trained.any() and not rest.any() and module.weight.grad.dtype == torch.float32, name
    assert_same(halves(train(model, weight_decay=0.0)), constant)
    layer = next(module for module in model.modules() if isinstance(module, HalfFrozenLinear))
    assert "5 rows trained" in repr(layer) and list(layer.state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="without bias"):
        HalfFrozenLinear.from_linear(nn.Linear(2, 2), 1, 0)


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_are_those_of_the_layer_but_for_the_constant_half(dim):
    torch.manual_seed(0)
    plain = nn.Linear(6, 4, bias=False).double()
    half = HalfFrozenLinear.from_linear(copy.deepcopy(plain), 2 if dim == 0 else 3, dim)
    x, g = (torch.randn(2, 3, width, dtype=torch.float64) for width in (6, 4))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, each in zip((plain, half), inputs):
        layer(each).backward(g)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-14)
    constant = half.weight.grad.tensor_split([half.trained], dim=dim)[1]
    assert not constant.any() and constant.numel()
    expected = plain.weight.grad.clone()
    expected.tensor_split([half.trained], dim=dim)[1].zero_()
    torch.testing.assert_close(half.weight.grad, expected, rtol=0, atol=1e-14)
    compiled = torch.compile(half, fullgraph=True, backend="aot_eager")
    half.weight.grad = None
    compiled(x).backward(g)
    torch.testing.assert_close(half.weight.grad, expected, rtol=0, atol=1e-14)


def test_a_rank_for_each_layer(covariances, tmp_path):
    from peft import PeftModel

    model = make(covariances, rank="energy:0.02")
    ranks = model.kore_info["rank"]
    assert len(set(ranks.values())) > 1
    for name, rank in ranks.items():
        layer = model.get_base_model().get_submodule(name)
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"] == 2 * rank
        assert layer.lora_A["default"].trained == layer.lora_B["default"].trained == rank
        assert layer.scaling["default"] == 1.0
    constant = halves(model)
    assert_same(halves(train(model, weight_decay=0.0)), constant)
    save_adapter(model, tmp_path / "a")
    stock = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "a").eval()
    torch.testing.assert_close(
        logits(stock, make_batch("llama")), logits(model, make_batch("llama")), rtol=0, atol=1e-5
    )
    model = make(covariances, rank="match-lora-6")
    assert model.kore_info["rank"] == 6
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * sum(
        6 * sum(linear.weight.shape) for name, linear in named_linears(MODELS["llama"]()).items() if name != "lm_head"
    )


def test_accelerate_says_why_it_leaves_it_alone(covariances):
    model = make(covariances)
    expected = logits(model.eval(), make_batch("llama"))
    done = kore.accelerate(model)
    assert not done.accelerated and set(done.left.values()) == {
        "A is trained beside a constant half (train_a), which the fused operation does not do"
    }
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    assert not kore.accelerate(model).accelerated  # B's constant half would train
    assert torch.equal(logits(model, make_batch("llama")), expected)
    with pytest.raises(ModelError, match="was made to train A"):
        freeze_a(model)


def test_odd_ranks_have_no_halves(covariances):
    model = get_kore_model(MODELS["llama"](), None, KoreConfig(rank=3, constraint="none"))
    with pytest.raises(ModelError, match=r"q_proj: expected an adapter of two halves, its rank is 3"):
        freeze_halves(model)


def test_two_sided_protection_is_refused(covariances):
    G = kore.capture_output_gradients(MODELS["llama"](), make_batches("llama", 1), progress=False)
    with pytest.raises(KoreError, match="its A is trained"):
        kore.two_sided(make(covariances), covariances["llama"], G, strength=1.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train-a")
    save_tiny("llama", folder / "model")
    tiny_conversations(folder / "data", 6, text_only=True)
    encoder = Encoder.from_pretrained(folder / "model")
    return encoder, load_conversations(folder / "data" / "conversations.json")


SETTINGS = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 2, "save_steps": 1, "report_to": [], "progress": False}


@pytest.mark.slow
def test_training_keeps_the_halves_and_resumes_to_the_same_adapter(work, covariances, tmp_path):
    from kore.training import checkpoints

    model = make(covariances)
    constant = halves(model)
    whole = kore.train(model, *work, SETTINGS, tmp_path / "whole")
    assert_same(halves(whole.model), constant)
    trained = halves(kore.load_kore_model(MODELS["llama"](), whole.adapter_dir, trainable=True))
    assert_same(trained, constant)

    class Killed(Exception):
        pass

    mark = checkpoints.mark_complete

    def die(checkpoint, step):
        mark(checkpoint, step)
        raise Killed

    from kore.training import trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "mark_complete", die)
        with pytest.raises(Killed):
            kore.train(make(covariances), *work, SETTINGS, tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoint-1").is_dir() and not (tmp_path / "killed" / "adapter").exists()
    resumed = kore.train(make(covariances), *work, SETTINGS, tmp_path / "killed")
    for name in ("adapter_model.safetensors", "kore.json"):
        assert (whole.adapter_dir / name).read_bytes() == (resumed.adapter_dir / name).read_bytes()


def test_training_with_weight_decay_is_refused(work, covariances, tmp_path):
    for settings in ({"weight_decay": 0.1}, {"trainer_arguments": {"weight_decay": 0.1}}):
        with pytest.raises(ConfigError, match=r"train.weight_decay: expected 0 for an adapter with train_a, got 0.1"):
            kore.train(make(covariances), *work, {**SETTINGS, **settings}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
