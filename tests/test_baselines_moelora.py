"""MoELoRA: what routed experts compute, what keeps them apart, their budget, and how they are saved."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from kore.adapter import load_adapter, save_adapter
from kore.adapter.routed import expert_ranks, routed_layers, routed_ranks, wrap_routed
from kore.adapter.wrap import wrap_lora
from kore.baselines import baseline, baseline_of, prepare_model
from kore.errors import ArtifactError, ConfigError, KoreError
from kore.merging import merge
from kore.models import language_model_linears
from kore.penalty import Start
from kore.protection.routing import balance, contrast, spread
from kore.training.trainer import forward, selects_logits
from tests.batches import KINDS, MODELS, logits, make_batch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(kind="llama", scale=0.1, double=True, **options):
    """A model of routed experts whose weights are away from their start."""
    base = MODELS[kind]().double() if double else MODELS[kind]()
    model = prepare_model(base, "moelora", rank=18, options=options)
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(scale * normal(*parameter.shape, seed=index).to(parameter.dtype))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["luo", "coin"])
def test_it_starts_at_the_untouched_model_and_trains_factors_routers_and_projector(kind, preset):
    model = prepare_model(MODELS[kind](), "moelora", rank=18, options={"preset": preset})
    batch = make_batch(kind)
    assert torch.equal(logits(model.eval(), batch), logits(MODELS[kind](), batch))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        f"base_model.model.{name}.lora_{part}.default.weight"
        for name in language_model_linears(MODELS[kind]())
        for part in ("A", "B", "router")
    }
    projector = {name for name in trained if ".modules_to_save." in name}
    assert trained - projector == expected and bool(projector) == (kind != "llama")
    routers = [p for name, p in model.named_parameters() if "lora_router" in name]
    assert len({float(p.detach().flatten()[0]) for p in routers}) == len(routers)
    again = prepare_model(MODELS[kind](), "moelora", rank=18, options={"preset": preset})
    states = model.state_dict(), again.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("options", [{}, {"preset": "coin"}, {"experts": 3, "top": 2}, {"experts": 5, "top": 1}])
def test_a_layer_is_the_sum_over_its_experts(options):
    model = moved(**options)
    N, top = baseline("moelora", **options).options.experts, baseline("moelora", **options).top
    for layer in list(routed_layers(model).values())[:7]:
        x = normal(2, 5, layer.in_features)
        probabilities, gates = layer.route(x, "default")
        torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5).double(), rtol=0, atol=1e-15)
        assert ((gates > 0).sum(-1) == (N if top is None else top)).all()
        logits_of_router = x @ layer.lora_router["default"].weight.T
        torch.testing.assert_close(probabilities, logits_of_router.softmax(-1), rtol=1e-14, atol=0)
        best = logits_of_router.topk(N if top is None else top).indices
        A, B, y, place = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer(x), 0
        for expert, r in enumerate(layer.ranks["default"]):
            block = slice(place, place + r)
            chosen = (best == expert).any(-1)
            weight = torch.where(chosen, probabilities[..., expert], 0) / probabilities.gather(-1, best).sum(-1)
            y = y + weight[..., None] * 2.0 * (x @ A[block].T @ B[:, block].T)
            place += r
        assert place == len(A)
        torch.testing.assert_close(layer(x), y, rtol=1e-13, atol=1e-14)


def test_one_expert_is_lora_to_the_bit_and_all_as_top_are_dense():
    names = language_model_linears(MODELS["llama"]())
    one = wrap_routed(MODELS["llama"](), dict.fromkeys(names, 4), 1, None, 2.0, None, 3)
    plain = wrap_lora(MODELS["llama"](), names, 4, 8, None, 3)
    for model in (one, plain):
        for index, (_, p) in enumerate((n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n):
            p.data.add_(0.1 * normal(*p.shape, seed=index).float())
    batch = make_batch("llama")
    found, wanted = logits(one.eval(), batch), logits(plain.eval(), batch)
    assert torch.equal(found, wanted) and not torch.equal(wanted, logits(MODELS["llama"](), batch))
    dense, top = moved(preset="coin", experts=3), moved(top=3, experts=3)
    assert torch.equal(logits(dense, batch), logits(top, batch))
    assert not torch.equal(logits(dense, batch), logits(moved(top=2, experts=3), batch))


def test_routers_stay_in_float32():
    model = prepare_model(MODELS["llama"]().to(torch.bfloat16), "moelora", rank=18)
    layer = next(iter(routed_layers(model).values()))
    assert layer.lora_router["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        probabilities, gates = layer.route(torch.randn(2, 3, layer.in_features).bfloat16(), "default")
    assert probabilities.dtype == gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3), rtol=0, atol=2e-7)


def test_the_balance_is_1_for_equal_load_and_n_for_one_expert():
    N, real = 4, torch.ones(3, 8, dtype=torch.bool)
    everyone = torch.full((3, 8, N), 1 / N, dtype=torch.float64)
    in_turn = torch.nn.functional.one_hot(torch.arange(8) % N, N).expand(3, -1, -1).bool()
    torch.testing.assert_close(balance(everyone, in_turn, real), torch.ones(3).double(), rtol=0, atol=1e-15)
    first = torch.zeros(3, 8, N, dtype=torch.float64).index_fill_(2, torch.tensor([0]), 1.0)
    torch.testing.assert_close(balance(first, first.bool(), real), torch.full((3,), 4.0).double(), rtol=0, atol=1e-15)
    p, mask = normal(1, 8, N).softmax(-1), real[:1].clone()
    mask[0, 5:] = False
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(2).indices, True)
    f = chosen[0, :5].double().mean(0) / 2
    wanted = N * (f * p[0, :5].mean(0)).sum()
    torch.testing.assert_close(balance(p, chosen, mask)[0], wanted, rtol=1e-14, atol=0)


def test_the_contrast_is_the_formula():
    outputs, expert = normal(1, 7, 5) / 4, torch.tensor([0, 0, 0, 1, 1, 2, 2])
    there = torch.ones(1, 7, dtype=torch.bool)
    there[0, 6] = False
    rows = [row / max(1.0, float(row.norm())) for row in outputs[0]]
    losses = []
    for q in range(6):
        for k in range(6):
            if k != q and expert[q] == expert[k]:
                others = sum(math.exp(float(rows[q] @ rows[j]) / 0.3) for j in range(6) if expert[j] != expert[q])
                own = math.exp(float(rows[q] @ rows[k]) / 0.3)
                losses.append(-math.log(own / (own + others)))
    wanted = sum(losses) / len(losses)
    assert len(losses) == 8
    expert = expert[None]
    assert float(contrast(outputs, expert, there, 0.3)) == pytest.approx(wanted, rel=1e-13)
    renamed = torch.tensor([[2, 2, 2, 0, 0, 1, 1]])
    torch.testing.assert_close(contrast(outputs, renamed, there, 0.3), contrast(outputs, expert, there, 0.3))
    with_scale = contrast(outputs * 1e6, expert, there, 0.3)
    torch.testing.assert_close(with_scale, contrast(outputs * 1e9, expert, there, 0.3), rtol=1e-12, atol=0)


def test_the_contrast_of_equal_outputs_and_which_way_it_pulls():
    expert, there = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    zero = torch.zeros(1, 4, 5, dtype=torch.float64, requires_grad=True)
    value = contrast(zero, expert, there, 0.1)
    assert float(value.detach()) == pytest.approx(math.log(1 + 2), rel=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), zero)
    assert not gradient.any()
    apart = normal(1, 4, 5) / 10
    together = apart.clone()
    together[0, 0] = together[0, 1] = (apart[0, 0] + apart[0, 1]) / apart[0, :2].sum(0).norm()
    assert float(contrast(together, expert, there, 0.1)) < float(contrast(apart, expert, there, 0.1))
    for alone in (torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 1, 2, 3]])):  # no other expert; no pair
        outputs = normal(1, 4, 5).requires_grad_()
        value = contrast(outputs, alone, there, 0.1)
        (gradient,) = torch.autograd.grad(value.sum(), outputs)
        assert float(value.detach()) == 0 and not gradient.any()


def test_tokens_are_spread_over_the_real_ones():
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0], [1] * 8], dtype=torch.bool)
    places, there = spread(real, 3)
    assert places[0].tolist() == [1, 3, 5] and places[2].tolist() == [0, 2, 5] and places[1, :2].tolist() == [0, 1]
    assert there.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert spread(real[1:2, :2], 5)[1].sum() == 2  # shorter than what is asked for


def guided(model, batch, count=None):
    penalty = baseline("moelora", balance=0.5, contrastive=0.25).penalty(model, None)
    penalty.begin(Start(model, None, [], 1, None, None))
    value = penalty.batch(forward(model.train(), batch, selects_logits(model), count))
    log = penalty.log()
    penalty.finish()
    return value, log


@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_how_a_step_is_split_matters(kind):
    model, batch = moved(kind), make_batch(kind)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    batch["labels"][:, :16] = -100
    batch["labels"][batch["attention_mask"] == 0] = -100
    whole, log = guided(model, batch)
    assert float(whole.detach()) == pytest.approx(0.5 * log["expert_balance"] + 0.25 * log["expert_contrast"])
    assert 0.9 < log["expert_balance"] < 8 and log["expert_contrast"] > 0.1
    count = (batch["labels"][:, 1:] != -100).sum()
    if kind == "llama":
        rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
        rows[1] = {key: value[:, :-5] for key, value in rows[1].items()}  # its padding
        parts = [guided(model, row, count)[0] for row in rows]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(whole, trained, allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g, p in zip(gradients, trained) if p.shape[0] == 8)
    assert not any(layer.recorder for layer in routed_layers(model).values())


@pytest.mark.parametrize("options", [{}, {"top": 3, "experts": 4}, {"preset": "coin"}])
def test_contrasted_are_the_outputs_of_the_experts_a_token_goes_to(options):
    model, records = moved(**options), []
    penalty = baseline("moelora", contrastive=1.0, balance=0.0, **options).penalty(model, None)
    penalty.begin(Start(model, None, [], 1, None, None))
    batch = {key: value[:1] for key, value in make_batch("llama").items()}
    for layer in routed_layers(model).values():
        layer.recorder = lambda *what, keep=layer.recorder: (keep(*what), records.append(what))
    value = penalty.batch(forward(model.train(), batch, selects_logits(model)))
    penalty.finish()
    places, there = spread(batch["attention_mask"].bool(), penalty.tokens)
    found = []
    for layer, adapter, _, gates, inner in records:
        B, blocks = layer.lora_B[adapter].weight, layer.ranks[adapter]
        pairs = zip(inner[:, places[0]].split(blocks, -1), B.split(blocks, 1))
        outputs = torch.cat([x @ b.T for x, b in pairs], 1)
        expert = torch.arange(len(blocks)).repeat_interleave(penalty.tokens)[None]
        routed = (gates[:, places[0]] > 0).mT.flatten(1) & there.repeat(1, len(blocks))
        found.append(contrast(outputs, expert, routed, 0.1))
    torch.testing.assert_close(value, torch.stack(found).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_that_of_lora(kind):
    for R in (16, 24):
        lora, routed = (prepare_model(MODELS[kind](), method, rank=R) for method in ("lora", "moelora"))
        counts = [sum(p.numel() for n, p in m.named_parameters() if ".lora_" in n) for m in (lora, routed)]
        assert 0.99 < counts[1] / counts[0] <= 1
    shapes = {f"{i}": shape for i, shape in enumerate([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])}
    assert set(routed_ranks(shapes, 128, 8).values()) <= {124, 125}  # LLaVA-1.5 7B
    assert expert_ranks(124, 8) == (16, 16, 16, 16, 15, 15, 15, 15)
    with pytest.raises(ConfigError, match=r"rank: 8 experts with their routers need a LoRA of rank \d+ or so .* got 9"):
        prepare_model(MODELS[kind](), "moelora", rank=9)


def test_it_is_saved_and_loaded_and_nothing_else_takes_it_for_a_lora(tmp_path):
    model = moved("llava", double=False)
    save_adapter(model, tmp_path / "a")
    info = json.loads((tmp_path / "a" / "kore.json").read_text())
    assert info["method"] == "moelora" and info["options"]["experts"] == 8 and info["routing"]["top"] == 2
    assert baseline_of(tmp_path / "a").options.preset == "luo"
    batch = make_batch("llava")
    for trainable in (False, True):
        loaded = load_adapter(MODELS["llava"](), tmp_path / "a", trainable)
        assert torch.equal(logits(loaded.eval(), batch), logits(model.eval(), batch))
        flags = {name: p.requires_grad for name, p in loaded.named_parameters()}
        expected = {name: p.requires_grad and trainable for name, p in model.named_parameters()}
        assert flags == expected
    from peft import PeftModel

    with pytest.raises((KeyError, ValueError, TypeError)):
        PeftModel.from_pretrained(MODELS["llava"](), str(tmp_path / "a"))
    MODELS["llava"]().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"routed experts \(method moelora\) cannot be merged: its change"):
        merge(tmp_path / "model", tmp_path / "a", tmp_path / "merged")
    for call in (loaded.merge_and_unload, loaded.merge_adapter):
        with pytest.raises(KoreError, match="cannot be merged"):
            call()
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded.eval(), batch), logits(MODELS["llava"](), batch))
    from kore.analysis.adapters import read_updates

    with pytest.raises(ConfigError, match="depends on the input"):
        read_updates(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="corrupt or changed"):
        load_adapter(MODELS["llava"](), tmp_path / "b")


def test_what_is_wrong_is_said():
    for options, words in (({"top": 9}, "expected 1 to 8"), ({"experts": 0}, "greater than"), ({"preset": "x"}, "luo")):
        with pytest.raises(ConfigError, match=rf"options.{next(iter(options))}.*{words}"):
            baseline("moelora", **options)
    assert baseline("moelora", preset="coin").penalty(None, None) is None
    assert baseline("moelora", top="all").top is None and baseline("moelora", experts=1).top == 1
    plain = prepare_model(MODELS["llama"](), "lora", rank=4)
    with pytest.raises(ConfigError, match="needs a model with routed experts"):
        baseline("moelora").penalty(plain, None).begin(Start(plain, None, [], 1, None, None))
