"""Two-sided protection: the formula against autograd, and training with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kore.artifacts import read_json
from kore.capture import capture_covariance, capture_output_gradients
from kore.data import conversation_batches, load_conversations
from kore.errors import ConfigError, KoreError, ModelError
from kore.models import base_model
from kore.protection import two_sided
from kore.protection.factored import factored
from kore.training import train
from tests.batches import MODELS, make_batches
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import prepared

CONFIG = dict(logging_steps=1, save_steps=None, report_to=[], progress=False, max_grad_norm=0, optimizer="sgd")


def adapted(kind="llama", seed=0, frozen=True, dtype=torch.float64):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(MODELS[kind](seed).to(dtype), LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
        if "lora_A" in name:
            parameter.requires_grad_(not frozen)
    return model


@pytest.fixture(scope="module")
def captured():
    model, batches = MODELS["llama"]().double(), make_batches("llama", 2)
    options = dict(progress=False, dtype=torch.float64)
    return capture_covariance(model, batches, **options), capture_output_gradients(model, batches, **options)


def formula(model, cov, gradients, strength):
    """λ Σ tr(Bᵀ G B A C Aᵀ) s² / tokens², written out."""
    total = 0.0
    for name, module in base_model(model).named_modules():
        if hasattr(module, "lora_B"):
            A, B = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            C, G = cov[name] / cov.tokens(name), gradients[name] / gradients.tokens(name)
            total = (
                total
                + strength
                * (module.scaling["default"] * B @ A).T.mm(G).mm(module.scaling["default"] * B @ A).mm(C).trace()
            )
    return total


def test_value_and_gradient_are_autograd_s(captured):
    model = adapted()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = formula(model, *captured, 3.5)
    by_autograd = torch.autograd.grad(wanted, list(trained.values()))
    penalty = two_sided(model, *captured, 3.5)
    value = penalty()
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=0)
    (2 * value).backward()
    assert len(penalty.terms) == 4 and len(by_autograd) == 4
    for (name, parameter), gradient in zip(trained.items(), by_autograd):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-11, atol=1e-14, msg=name)
    assert penalty.bytes() == 8 * sum(term.G.numel() + term.M.numel() for term in penalty.terms)


def test_it_estimates_the_divergence_from_the_old_model(captured):
    """Small updates: at λ = ½ it is KL(old ‖ new) for each row, to the accuracy of the Kronecker factors."""
    batches = make_batches("llama", 2)
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-3)
    estimate = float(two_sided(model, *captured, 0.5)().detach())
    divergence, rows = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            new = model(**inputs).logits.log_softmax(-1)
            with model.disable_adapter():
                old = model(**inputs).logits.log_softmax(-1)
            keep = batch["attention_mask"].bool()
            divergence += float((old.exp() * (old - new)).sum(-1)[keep].sum())
            rows += int(keep.sum())
    assert estimate == pytest.approx(divergence / rows, rel=0.5)


def test_bfloat16_weights_are_summed_in_float32(captured):
    model = adapted().to(torch.bfloat16)
    exact = formula(model, *captured, 1.0).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = two_sided(model, *captured, 1.0)()
    assert value.dtype == torch.float32 and float(value.detach()) == pytest.approx(float(exact), rel=1e-4)
    value.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)


def test_what_is_wrong_is_said(captured):
    cov, gradients = captured
    with pytest.raises(KoreError, match="frozen A"):
        two_sided(adapted(frozen=False), cov, gradients, 1.0)
    with pytest.raises(KoreError, match="strength: expected a finite number ≥ 0 or 'auto', got -1"):
        two_sided(adapted(), cov, gradients, -1)
    with pytest.raises(KoreError, match="in this order, got OutputGradients and CovarianceSet"):
        two_sided(adapted(), gradients, cov, 1.0)
    with pytest.raises(KoreError, match="no LoRA adapter"):
        two_sided(MODELS["llama"](), cov, gradients, 1.0)
    with pytest.raises(ModelError, match="the covariance belongs to another model"):
        two_sided(adapted(seed=1), cov, gradients, 1.0)
    for options, words in (
        ({"max_divergence": 0}, "max_divergence: expected a finite number > 0"),
        ({"components": 0}, "components: expected a number ≥ 1"),
        ({"dtype": "bfloat16"}, "bfloat16 with components"),
    ):
        with pytest.raises(KoreError, match=words):
            two_sided(adapted(), cov, gradients, 1.0, **options)
    with pytest.raises(KoreError, match=r"strength is 'auto', which kore.train sets"):
        two_sided(adapted(), cov, gradients)()
    model, batches = MODELS["llama"]().double(), make_batches("llama", 1)
    some = capture_output_gradients(model, batches, ["q_proj"], progress=False, dtype=torch.float64)
    with pytest.raises(KoreError, match=r"no covariance for module .*up_proj"):
        two_sided(adapted(), cov, some, 1.0)


def spd(d, decay, seed=0):
    """G with eigenvalues e^(−decay i) in random directions, the diagonal far from even."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scale = torch.rand(d, generator=generator, dtype=torch.float64) * 2
    G = scale[:, None] * (Q * torch.exp(-decay * torch.arange(d, dtype=torch.float64))) @ Q.T * scale
    return (G + G.T) / 2


@pytest.mark.parametrize("storage", [torch.float64, torch.bfloat16])
def test_components_keep_the_diagonal_and_stay_below_nothing(storage):
    G = spd(90, 0.1)
    kept = factored(G, 12, torch.float64, storage)
    assert kept.F.shape == (90, 12) and kept.F.dtype == storage and kept.D.dtype == torch.float64
    assert kept.nbytes == 90 * 12 * storage.itemsize + 90 * 8
    dense = kept @ torch.eye(90, dtype=torch.float64)
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-14)
    if storage == torch.float64:
        torch.testing.assert_close(dense.diagonal(), G.diagonal(), rtol=1e-12, atol=0)
        assert torch.linalg.eigvalsh(G - kept.F @ kept.F.T)[0] > -1e-12
        best = torch.linalg.eigvalsh(G)[:-12]
        assert torch.linalg.norm(G - kept.F @ kept.F.T, 2) < 1.05 * best[-1]
    assert torch.linalg.eigvalsh(dense)[0] > 0
    assert (dense.trace() / G.trace() - 1).abs() < (1e-12 if storage == torch.float64 else 1e-3)
    # Why a whole G is never kept in bfloat16:
    assert torch.linalg.eigvalsh(G.to(torch.bfloat16).double())[0] < -1e-6


def test_all_components_are_the_whole_and_a_rank_deficient_g_is_no_trouble():
    G = spd(20, 0.2)
    torch.testing.assert_close(
        factored(G, 20, torch.float64, torch.float64) @ torch.eye(20, dtype=torch.float64), G, rtol=0, atol=1e-14
    )
    thin = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = factored(thin @ thin.T, 8, torch.float64, torch.float64)
    torch.testing.assert_close(kept.F @ kept.F.T, thin @ thin.T, rtol=0, atol=1e-10)
    zero = factored(torch.zeros(5, 5), 2, torch.float32, torch.float32)
    assert not (zero @ torch.ones(5, 2)).any()


def test_a_penalty_in_components_is_the_formula_of_what_it_holds(captured):
    model = adapted()
    penalty = two_sided(model, *captured, 2.0, components=6)
    whole = two_sided(model, *captured, 2.0)
    value = penalty()
    value.backward()
    wanted = 0.0
    for term in penalty.terms:
        B = term.B.detach().clone().requires_grad_()
        dense = term.G @ torch.eye(len(B), dtype=torch.float64)
        part = 2.0 * (B.T @ dense @ B @ term.M).trace()
        (gradient,) = torch.autograd.grad(part, B)
        torch.testing.assert_close(term.B.grad, gradient, rtol=1e-11, atol=1e-14)
        wanted = wanted + part.detach()
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-12, atol=0)
    assert 0.5 < float(value.detach() / whole().detach()) < 2 and penalty.bytes() < 0.6 * whole.bytes()
    assert float(penalty.divergence) == pytest.approx(float(value.detach()) / 4, rel=1e-12)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("protection")
    save_tiny("llama", root / "llama")
    tiny_conversations(root / "text", 8, text_only=True)
    return root


def protected(root: Path, strength: float):
    """Model, encoder, data, and a penalty on random B."""
    model, encoder = prepared("llama", root)
    data = load_conversations(root / "text" / "conversations.json")
    batches = conversation_batches(data, encoder, 4)
    cov = capture_covariance(model, batches, progress=False, distributed=False)
    gradients = capture_output_gradients(model, batches, progress=False, distributed=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, encoder, data, two_sided(model, cov, gradients, strength)


def test_one_step_adds_its_gradient_however_the_step_is_split(root, tmp_path):
    strength, rate, after = 40.0, 1e-2, {}
    for label, (batch, split, protect) in {"plain": (8, 1, 0), "whole": (8, 1, 1), "split": (2, 4, 1)}.items():
        model, encoder, data, penalty = protected(root, strength)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        config = {**CONFIG, "batch_size": batch, "gradient_accumulation": split, "max_steps": 1, "warmup_ratio": 0}
        value = penalty()
        gradients = dict(zip(before, torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])))
        result = train(
            model,
            encoder,
            data,
            {**config, "learning_rate": rate, "scheduler": "constant"},
            tmp_path / label,
            penalty=penalty if protect else None,
        )
        after[label] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        after[label, "loss"] = result.history[0]["loss"]
        if protect:
            assert result.history[0]["penalty"] == pytest.approx(value.item(), rel=1e-5)
    moved = sum(float(gradient.norm()) for gradient in gradients.values())
    assert moved > 1e-3
    for name, plain in after["plain"].items():
        torch.testing.assert_close(after["whole"][name], plain - rate * gradients[name], rtol=1e-5, atol=2e-7)
        torch.testing.assert_close(after["split"][name], after["whole"][name], rtol=1e-5, atol=2e-7)
    for label in ("whole", "split"):
        assert after[label, "loss"] == pytest.approx(after["plain", "loss"] + value.item(), rel=1e-4)


@pytest.mark.slow
def test_a_strong_penalty_keeps_b_small_and_another_one_is_another_run(root, tmp_path):
    sizes = []
    for strength in (0.0, 1e5):
        model, encoder, data, penalty = protected(root, strength)
        config = {**CONFIG, "optimizer": "adamw_torch", "batch_size": 8, "max_steps": 20, "learning_rate": 1e-2}
        history = train(model, encoder, data, config, tmp_path / f"{strength}", penalty=penalty).history
        sizes.append(float(two_sided_value(penalty)))
        assert history[-1]["step"] == 20
    assert sizes[1] < 0.3 * sizes[0]
    with pytest.raises(ConfigError, match="other penalty"):
        train(model, encoder, data, config, tmp_path / "0.0", penalty=penalty)
    with pytest.raises(ConfigError, match="FSDP1"):
        train(model, encoder, data, {**config, "fsdp": "full_shard"}, tmp_path / "f", penalty=penalty)


def test_the_rule_sets_the_strength_from_the_untouched_model_s_loss(root, tmp_path):
    """λ = L0 / (2 κ), whatever B is, kept for a resumed run; the divergence then stays below κ."""
    model, encoder, data, _ = protected(root, 0.0)
    batches = conversation_batches(data, encoder, 4)
    cov = capture_covariance(model, batches, progress=False, distributed=False)
    gradients = capture_output_gradients(model, batches, progress=False, distributed=False)
    penalty = two_sided(model, cov, gradients, max_divergence=2e-3)
    total, count = 0.0, 0
    with torch.no_grad(), model.disable_adapter():
        for item in data:
            labels = encoder.encode(item)["labels"]
            logits = model(input_ids=encoder.encode(item)["input_ids"][None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
            count += int((labels[1:] != -100).sum())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    config = {**CONFIG, "optimizer": "adamw_torch", "batch_size": 8, "max_steps": 8, "learning_rate": 1e-2}
    history = train(model, encoder, data, config, tmp_path, penalty=penalty).history
    assert penalty.strength == pytest.approx(total / count / (2 * 2e-3), rel=1e-5)
    assert read_json(tmp_path / "penalty" / "strength.json")["strength"] == penalty.strength
    assert 0 < history[-1]["old_divergence"] < 2e-3
    assert history[-1]["penalty"] == pytest.approx(2 * penalty.strength * history[-1]["old_divergence"], rel=1e-5)
    (tmp_path / "history.json").unlink()
    (tmp_path / "penalty" / "strength.json").write_text('{"loss": 8}')
    again = two_sided(model, cov, gradients, max_divergence=2e-3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    train(model, encoder, data, config, tmp_path, penalty=again)
    assert again.strength == 8 / (2 * 2e-3)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        stage3 = {"zero_optimization": {"stage": 3}}
        train(model, encoder, data, {**config, "deepspeed": stage3}, tmp_path / "z", penalty=again)


def two_sided_value(penalty):
    return sum(term.value().detach() for term in penalty.terms)
