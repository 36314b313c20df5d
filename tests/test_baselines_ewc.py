"""EWC: the Fisher information against plain loops and closed forms, the penalty against autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kore.adapter.wrap import wrap_lora
from kore.artifacts import read_json
from kore.baselines import baseline, prepare_model
from kore.data import Encoder, load_conversations
from kore.errors import ArtifactError, ConfigError, KoreError
from kore.models import base_model
from kore.penalty import Start
from kore.protection import fisher
from kore.protection.consolidation import Consolidation, ParameterTerm
from kore.protection.fisher import diagonal_fisher
from kore.training.dataset import TrainingSet
from tests.batches import MODELS
from tests.tiny import save_tiny, tiny_conversations

KINDS = ["llava", "llama"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ewc")
    for kind in KINDS:
        save_tiny(kind, root / kind)
    tiny_conversations(root / "llava" / "data", 5)
    tiny_conversations(root / "llama" / "data", 5, text_only=True)
    return root


class Float64Encoder:
    """An encoder whose pictures are float64, as the models of these tests are."""

    def __init__(self, encoder):
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def collate(self, examples):
        batch = self._encoder.collate(examples)
        return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def given(root, kind, method="ewc", **options):
    """A float64 model prepared by the method, its encoder, old conversations, and the penalty."""
    model = prepare_model(MODELS[kind]().double(), method, rank=4, **({"options": options} if options else {}))
    encoder = Float64Encoder(Encoder.from_pretrained(root / kind))
    images = root / kind / "data" / "images" if kind == "llava" else None
    old = load_conversations(root / kind / "data" / "conversations.json", images)
    return model, encoder, old, baseline(method, **options).penalty(model, encoder, old)


def start(model, encoder, folder, **more):
    return Start(model, encoder, [], 1, folder, lambda: 0.0, **more)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def move(model, scale=0.05, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def loop(model, encoder, conversations, parameters):
    """Σ g² / tokens, example by example, with the labels of the data and the model's own loss."""
    sums, tokens = [torch.zeros_like(p) for p in parameters], 0
    for conversation in conversations:
        batch = encoder.collate([encoder.encode(conversation)])
        count = int((batch["labels"][:, 1:] != -100).sum())
        loss = model(**batch).loss * count  # Hugging Face takes the mean
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            total += 0 if gradient is None else gradient**2
        tokens += count
    return [total / tokens for total in sums]


@pytest.mark.parametrize("kind", KINDS)
def test_f_is_the_sum_of_the_squares_of_every_example_s_gradient(root, kind):
    model, encoder, old, _ = given(root, kind)
    move(model)
    parameters = trained(model)
    examples = TrainingSet(old, encoder)
    model.train()
    F = diagonal_fisher(model, parameters, encoder, examples, "data")
    assert model.training and trained(model).keys() == parameters.keys()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    wanted = loop(model, encoder, old, list(parameters.values()))
    for (name, found), value in zip(F.items(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-18, msg=name)  # its cross entropy is in float32
    one = next(iter(parameters))
    batch = encoder.collate([encoder.encode(conversation) for conversation in old])
    (mean,) = torch.autograd.grad(model(**batch).loss, parameters[one])
    assert F[one].sum() > 2 * (mean**2).sum(), "the square of a batch's mean is something else"


def test_both_halves_make_the_whole(root):
    model, encoder, old, _ = given(root, "llama")
    move(model)
    parts = []
    for members in (old, old[:2], old[2:]):
        examples = TrainingSet(members, encoder)
        parts.append((diagonal_fisher(model, trained(model), encoder, examples, "data"), examples.answer_tokens))
    (whole, tokens), (one, first), (two, second) = parts
    assert tokens == first + second
    for name, value in whole.items():
        torch.testing.assert_close((first * one[name] + second * two[name]) / tokens, value, rtol=1e-12, atol=0)


def test_labels_drawn_from_the_model_depend_on_the_seed_alone(root):
    model, encoder, old, _ = given(root, "llama")
    move(model)
    examples = TrainingSet(old, encoder)
    state = torch.get_rng_state()

    def F(labels="model", seed=0):
        return diagonal_fisher(model, trained(model), encoder, examples, labels, seed)

    one, same, other, data = F(), F(), F(seed=1), F("data")
    assert torch.equal(state, torch.get_rng_state())
    name = next(name for name in one if "lora_B" in name)
    assert torch.equal(one[name], same[name])
    assert not torch.allclose(one[name], other[name]) and not torch.allclose(one[name], data[name])


class Softmax(nn.Module):
    """logits = W x, with x looked up by the token before."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.W = nn.Parameter(torch.randn(6, 3, generator=generator, dtype=torch.float64))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.x[input_ids] @ self.W.T)


class Tokens:
    """500 examples of three predictions each, from the tokens 0 to 3."""

    ids = torch.tensor([0, 1, 2, 3])

    def __len__(self):
        return 500

    def __getitem__(self, index):
        labels = self.ids.clone()
        labels[0] = labels[1] = -100  # the first prediction does not count
        return {"input_ids": self.ids, "labels": labels}

    def collate(self, examples):
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def test_on_a_linear_softmax_model_it_is_the_closed_form():
    """F_ij = mean over the predictions of p_i (1 − p_i) x_j²; the square of a drawn sum has it as its mean."""
    model, tokens = Softmax(), Tokens()
    F = diagonal_fisher(model, {"W": model.W}, tokens, tokens, "model", 5)["W"]
    x = model.x[[1, 2]]
    p = (x @ model.W.detach().T).softmax(-1)
    wanted = torch.einsum("ti,tj->ij", p * (1 - p), x**2) / 2
    torch.testing.assert_close(F, wanted, rtol=0.3, atol=0.02)
    empirical = diagonal_fisher(model, {"W": model.W}, tokens, tokens, "data")["W"]
    assert (empirical / wanted - 1).abs().max() > 0.5, "the labels of the data are not the model's"


@pytest.mark.parametrize("kind", KINDS)
def test_a_is_not_held_where_b_is_zero(root, kind, tmp_path):
    """∂L/∂A = s Bᵀ ∂L/∂ΔW = 0."""
    model, encoder, _, penalty = given(root, kind)
    penalty.begin(start(model, encoder, tmp_path))
    F = fisher.load_fisher(tmp_path / "fisher")
    assert len(F) == len(trained(model)) == len(penalty.terms)
    assert all(bool(value.any()) == ("lora_A" not in name) for name, value in F.items())
    move(model)
    penalty.step().backward()
    for name, parameter in trained(model).items():
        assert bool(parameter.grad.any()) == ("lora_A" not in name), name


@pytest.mark.parametrize("over", ["parameters", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_paid_at_the_start(root, kind, over, tmp_path):
    model, encoder, _, penalty = given(root, kind, over=over, strength=7.0)
    flags, before = trained(model).keys(), {n: p.detach().clone() for n, p in model.named_parameters()}
    penalty.begin(start(model, encoder, tmp_path))
    assert trained(model).keys() == flags
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    value = penalty.step()
    assert float(value.detach()) == 0
    value.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert penalty.log() == {"old_divergence": 0.0}


def test_value_and_gradient_are_the_formula(root, tmp_path):
    model, encoder, _, penalty = given(root, "llava", strength=7.0)
    move(model, seed=1)
    θ0 = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    penalty.begin(start(model, encoder, tmp_path))
    move(model)
    F = {f"base_model.model.{name}": value for name, value in fisher.load_fisher(tmp_path / "fisher").items()}
    assert F.keys() == θ0.keys() and all(value.any() for value in F.values())
    value = penalty.step()
    wanted = sum(3.5 * (F[name] * (p.detach() - θ0[name]) ** 2).sum() for name, p in trained(model).items())
    torch.testing.assert_close(value.detach(), wanted, rtol=1e-13, atol=0)
    assert penalty.log()["old_divergence"] == pytest.approx(float(wanted) / 7, rel=1e-12)
    (2 * value).backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(
            parameter.grad, 2 * 7.0 * F[name] * (parameter.detach() - θ0[name]), rtol=1e-13, atol=0, msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_over_weights_the_function_is_held_whatever_a_does(root, kind, tmp_path):
    model, encoder, old, penalty = given(root, kind, over="weights", labels="data", strength=7.0)
    plain = MODELS[kind]().double()
    names = [name for name, module in base_model(model).named_modules() if hasattr(module, "lora_B")]
    weights = [plain.get_submodule(name).weight for name in names]
    projector = [p for name, p in plain.named_parameters() if "projector" in name]
    wanted = loop(plain, encoder, old, [*weights, *projector])
    anchors = [p.detach().clone() for p in projector]
    penalty.begin(start(model, encoder, tmp_path))
    move(model)
    value = penalty.step()
    total = sum(
        3.5
        * (F * (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight) ** 2).sum()
        for F, layer in zip(wanted, (base_model(model).get_submodule(name) for name in names))
    )
    now = [p for name, p in trained(model).items() if "projector" in name]
    total = total + sum(3.5 * (F * (p - p0) ** 2).sum() for F, p, p0 in zip(wanted[len(names) :], now, anchors))
    assert len(now) == len(anchors) == (4 if kind == "llava" else 0)
    torch.testing.assert_close(value, total, rtol=1e-5, atol=0)  # the reference's cross entropy is in float32
    parameters = list(trained(model).values())
    for gradient, other in zip(torch.autograd.grad(2 * value, parameters), torch.autograd.grad(2 * total, parameters)):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-12)
        assert gradient.any()


def test_a_half_precision_parameter_is_held_in_float32():
    holder = nn.Linear(40, 30, bias=False).to(torch.bfloat16)
    F = torch.rand(30, 40)
    term = ParameterTerm(holder, "weight", F)
    start = holder.weight.detach().float()
    holder.weight.data += 0.01
    change = holder.weight.detach().float() - start
    term.value().backward()
    assert float(term.value().detach()) == pytest.approx(float((F * change**2).sum()), rel=1e-6)
    assert holder.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(holder.weight.grad, (2 * F * change).to(torch.bfloat16))


def test_at_one_a_quadratic_old_loss_is_replaced_exactly():
    """argmin of new + EWC(λ = 1) is that of new + old where old is ½ Σ F (θ − θ₀)²."""
    generator = torch.Generator().manual_seed(0)
    holder = nn.Linear(5, 1, bias=False).double()
    F = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    term, θ0 = ParameterTerm(holder, "weight", F), holder.weight.detach().clone()
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    H, m = root @ root.T, torch.randn(5, generator=generator, dtype=torch.float64)
    holder.weight.data[0] = torch.linalg.solve(H + F[0].diag(), H @ m + F[0] * θ0[0])
    new = (holder.weight[0] - m) @ H @ (holder.weight[0] - m) / 2
    (new + term.value() / 2).backward()
    assert holder.weight.grad.abs().max() < 1e-12


def test_tied_weights_and_biases_of_a_whole_model_are_held_once(root, tmp_path):
    from tests.tiny import tiny_llama

    model = prepare_model(tiny_llama(tie_word_embeddings=True).double(), "ewc-full")
    encoder = Float64Encoder(Encoder.from_pretrained(root / "llama"))
    old = load_conversations(root / "llama" / "data" / "conversations.json")
    penalty = baseline("ewc-full", samples=2).penalty(model, encoder, old)
    penalty.begin(start(model, encoder, tmp_path))
    assert len(penalty.terms) == len(list(model.parameters()))
    assert read_json(tmp_path / "fisher" / "manifest.json")["examples"] == 2
    with pytest.raises(ConfigError, match=r"options.over: no such option of method ewc-full"):
        baseline("ewc-full", over="weights")


def test_it_is_computed_once_and_after_a_stop_in_the_middle_as_if_there_had_been_none(root, tmp_path, monkeypatch):
    model, encoder, _, penalty = given(root, "llama")
    penalty.begin(start(model, encoder, tmp_path / "whole", seed=4))
    whole = fisher.load_fisher(tmp_path / "whole" / "fisher")
    calls, real = [], fisher._backward

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(fisher, "_backward", stopped)
    flags = trained(model).keys()
    with pytest.raises(KeyboardInterrupt):
        penalty.begin(start(model, encoder, tmp_path / "cut", seed=4))
    assert trained(model).keys() == flags and not (tmp_path / "cut" / "fisher").exists()
    penalty.begin(start(model, encoder, tmp_path / "cut", seed=4))
    cut = fisher.load_fisher(tmp_path / "cut" / "fisher")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    count = len(calls)
    penalty.begin(start(model, encoder, tmp_path / "cut", seed=4))
    assert len(calls) == count, "it is read where it is there"
    file = tmp_path / "cut" / "fisher" / "fisher.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        penalty.begin(start(model, encoder, tmp_path / "cut", seed=4))


def test_only_what_decides_the_result_is_its_identity(root):
    _, encoder, old, penalty = given(root, "llama")
    assert penalty.identity() == given(root, "llama")[3].identity()
    others = [
        given(root, "llama", **{key: value})[3] for key, value in dict(strength=2, labels="data", samples=1).items()
    ]
    others += [given(root, "llama", over="weights")[3], Consolidation(old[1:], encoder, samples=256)]
    identities = [str(other.identity()) for other in [penalty, *others]]
    assert len(set(identities)) == 6


def test_what_is_wrong_is_said(root, tmp_path):
    model, encoder, old, penalty = given(root, "llama")
    with pytest.raises(ConfigError, match="old: method ewc needs old conversations with answers"):
        baseline("ewc").penalty(model, encoder)
    with pytest.raises(KoreError, match="F is not there yet"):
        penalty.step()
    for options, words in (
        ({"labels": "batch"}, "labels"),
        ({"samples": 0}, "samples"),
        ({"strength": -1}, "strength"),
    ):
        with pytest.raises(ConfigError, match=rf"options.{words}"):
            baseline("ewc", **options)
    weights = Consolidation(old, encoder, over="weights")
    with pytest.raises(ConfigError, match="over: weights needs a LoRA adapter"):
        weights.begin(start(prepare_model(MODELS["llama"](), "full"), encoder, tmp_path))
    move(model)
    with pytest.raises(ConfigError, match=r"whose B is 0; that of .*q_proj is not"):
        weights.begin(start(model, encoder, tmp_path))
    broken = wrap_lora(MODELS["llama"]().double(), ["model.layers.0.mlp.up_proj"], 2, None, None, 0)
    next(p for name, p in broken.named_parameters() if "embed" in name).data.fill_(float("nan"))
    with pytest.raises(KoreError, match="is not finite; look for broken old examples"):
        Consolidation(old, encoder).begin(start(broken, encoder, tmp_path))
