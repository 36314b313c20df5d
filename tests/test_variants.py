"""The method's neighbours by one option each: LoRA-Null, the strength between two subspaces, and what they save."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kore import baselines
from kore.adapter import KoreConfig, get_kore_model, load_kore_model, save_adapter
from kore.analysis import leak
from kore.capture import capture_covariance
from kore.errors import ConfigError, KoreError
from kore.nullspace import geodesic, null_space
from tests.batches import MODELS, logits, make_batch, make_batches

KINDS = ("llama", "llava")
RANK = 5


@pytest.fixture(scope="module")
def covariances():
    return {kind: capture_covariance(MODELS[kind](), make_batches(kind, 4), progress=False) for kind in KINDS}


def graded(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    return V * torch.logspace(-8, 4, d, dtype=torch.float64) @ V.mT


def subspace(d, r, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator)).Q


def apart(U, V):
    """‖U Uᵀ − V Vᵀ‖: 0 for the same subspace, whatever its basis."""
    return float(torch.linalg.matrix_norm(U @ U.mT - V @ V.mT))


@pytest.mark.parametrize(("d", "r"), [(60, 1), (60, 12), (61, 40), (48, 48)])
def test_the_geodesic_goes_from_one_subspace_to_the_other(d, r):
    C = graded(d)
    start, end = subspace(d, r), null_space(C, r, "eigh").basis
    steps = torch.linspace(0, 1, 21, dtype=torch.float64).tolist()
    path = [geodesic(start, end, t) for t in steps]
    assert apart(path[0], start) < 1e-12 and apart(path[-1], end) < 1e-12
    identity = torch.eye(r, dtype=torch.float64)
    for U in path:
        torch.testing.assert_close(U.mT @ U, identity, rtol=0, atol=1e-12)
    energies = [float((U * (C @ U)).sum()) for U in path]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energies))
    # Each principal angle is gone through at a constant rate: the distance to the start is t times that of the ends.
    angles = torch.linalg.svdvals(start.mT @ end).clamp_max(1).acos()
    for t, U in zip(steps, path):
        found = torch.linalg.svdvals(start.mT @ U).clamp_max(1).acos()
        torch.testing.assert_close(found.sort().values, (t * angles).sort().values, rtol=0, atol=1e-7)
    assert torch.equal(path[7], geodesic(start, end, steps[7]))


def test_a_geodesic_between_nearly_the_same_subspaces_keeps_its_accuracy():
    end = subspace(50, 6)
    start = torch.linalg.qr(end + 1e-9 * subspace(50, 6, 2)).Q
    middle = geodesic(start, end, 0.5)
    torch.testing.assert_close(middle.mT @ middle, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert apart(middle, end) == pytest.approx(apart(start, end) / 2, rel=1e-5)
    assert apart(geodesic(end, end, 0.3), end) < 1e-12


def test_wrong_geodesics():
    with pytest.raises(KoreError, match=r"expected two bases .* got \(4, 2\) and \(4, 3\)"):
        geodesic(subspace(4, 2), subspace(4, 3), 0.5)
    with pytest.raises(KoreError, match=r"from 0 to 1, got 1\.5"):
        geodesic(subspace(4, 2), subspace(4, 2), 1.5)


def rows(model, name):
    return torch.linalg.qr(model.get_base_model().get_submodule(name).lora_A["default"].weight.double().mT).Q


def test_strength_lies_between_no_constraint_and_the_null_space(covariances):
    cov = covariances["llama"]

    def make(cov, **changes):
        return get_kore_model(MODELS["llama"](), cov, KoreConfig(rank=RANK, seed=3, **changes), progress=False)

    ends = make(cov, constraint="none"), make(cov)
    shares = [leak(ends[0], cov)]
    for strength in (1e-6, 0.25, 0.5, 0.75, 1.0):
        model = make(cov, strength=strength)
        shares.append(leak(model, cov))
        for name in cov.modules:
            expected = geodesic(rows(ends[0], name), rows(ends[1], name), strength)
            assert apart(rows(model, name), expected) < 1e-4
            note, C = model.kore_info["null_spaces"][name], cov[name].double()
            if strength < 1:
                U = rows(model, name)
                assert note["energy_at_strength"] == pytest.approx(float((U * (C @ U)).sum()), rel=1e-4)
            else:
                assert "strength" not in note
    for name in cov.modules:
        values = [share[name] for share in shares]
        assert values == pytest.approx(sorted(values, reverse=True), rel=1e-5) and values[0] > 2 * values[-1]
    one, other = make(cov, strength=0.5), make(cov, strength=0.5)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0}, 'strength: expected a number above 0 and up to 1, got 0; 0 is constraint="none"'),
        ({"strength": 1.5}, "got 1.5"),
        ({"strength": float("nan")}, "got nan"),
        ({"strength": "half"}, "got 'half'"),
        ({"strength": True}, "got True"),
        ({"strength": 0.5, "constraint": "none"}, "strength: 0.5 lies between"),
        ({"strength": 0.5, "rank": "energy:0.01"}, "strength: at 0.5 A reads more .* than rank 'energy:0.01' allows"),
        ({"train_a": "yes"}, "train_a: expected true or false, got 'yes'"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        KoreConfig(**{"rank": 4, **changes})


class OfficialLinear(nn.Module):
    """LoRA-Null as its authors write it: U from svd(C), B0 A0 = W0 U Uᵀ by a whole SVD, the rest a residual weight."""

    def __init__(self, linear, C, r, train_a):
        super().__init__()
        W0 = linear.weight.detach()
        U_min = torch.linalg.svd(C.double()).U[:, -r:]
        projected = W0 @ (U_min @ U_min.T)
        U, S, Vh = torch.linalg.svd(projected)
        self.residual = W0 - projected
        self.B = nn.Parameter(U[:, :r] * S[:r].sqrt())
        self.A = nn.Parameter(S[:r].sqrt()[:, None] * Vh[:r], requires_grad=train_a)

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B) + F.linear(x, self.residual)


@pytest.mark.parametrize(("method", "train_a"), [("lora-null-v1", True), ("lora-null-v2", False)])
def test_lora_null_is_its_authors_arithmetic(covariances, method, train_a):
    cov = covariances["llama"]
    model = baselines.prepare_model(MODELS["llama"]().double(), method, cov, rank=RANK, progress=False).train()
    theirs = MODELS["llama"]().double().requires_grad_(False).train()
    for name in cov.modules:
        parent, _, leaf = name.rpartition(".")
        layer = OfficialLinear(theirs.get_submodule(name), cov[name], RANK, train_a)
        setattr(theirs.get_submodule(parent), leaf, layer)
    for name in cov.modules:
        ours, other = model.get_base_model().get_submodule(name), theirs.get_submodule(name)
        A = ours.lora_A["default"].weight[:RANK]
        signs = (A * other.A).sum(dim=1, keepdim=True).sign()
        torch.testing.assert_close(A, signs * other.A, rtol=0, atol=1e-9)
        if train_a:
            torch.testing.assert_close(ours.lora_B["default"].weight[:, :RANK], other.B * signs.mT, rtol=0, atol=1e-9)
    for each in (model, theirs):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for step in range(5):
            each(**make_batch("llama", seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in cov.modules:
        ours, other = model.get_base_model().get_submodule(name), theirs.get_submodule(name)
        weight = ours.get_base_layer().weight + ours.get_delta_weight("default")
        torch.testing.assert_close(weight, other.residual + other.B @ other.A, rtol=0, atol=1e-8)
        assert (weight - ours.get_base_layer().weight).abs().max() > 1e-4


def test_lora_null_is_kore_to_the_bit(covariances):
    def state(method, **options):
        model = baselines.prepare_model(MODELS["llava"](), method, covariances["llava"], rank=RANK, **options)
        assert model.kore_info["method"] == method
        return {name: (p.requires_grad, p) for name, p in model.named_parameters()}

    for method, options in (("lora-null-v1", {"train_a": True}), ("lora-null-v2", {})):
        theirs, ours = state(method), state("kore", **options)
        assert theirs.keys() == ours.keys()
        for name, (flag, p) in ours.items():
            assert theirs[name][0] == flag and torch.equal(theirs[name][1], p)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora-null-v2", {"train_a": True}, "train_a: expected false for method lora-null-v2.*lora-null-v1 trains A"),
        ("lora-null-v1", {"scale": "orthonormal"}, "scale: expected sqrt for method lora-null-v1"),
        ("lora-null-v1", {"strength": 0.5}, "strength: expected 1 for method lora-null-v1, got 0.5"),
        ("random-a", {"train_a": True}, "train_a: expected false for method random-a"),
        ("random-a", {"strength": 0.5}, "strength: expected 1"),
        ("lora", {"train_a": True}, "train_a"),
        ("full", {"strength": 0.5}, "strength"),
        ("lora-null-v1", {}, "needs a covariance"),
    ],
)
def test_options_of_another_method(method, options, message):
    with pytest.raises(ConfigError, match=message):
        baselines.prepare_model(MODELS["llama"](), method, rank=4, **options)


VARIANTS = {
    "kore": ("kore", {}),
    "orthonormal": ("kore", {"scale": "orthonormal"}),
    "train-a": ("kore", {"train_a": True}),
    "strength": ("kore", {"strength": 0.5}),
    "strength-train-a": ("kore", {"strength": 0.5, "train_a": True}),
    "energy": ("kore", {"rank": "energy:0.02"}),
    "energy-train-a": ("kore", {"rank": "energy:0.02", "train_a": True}),
    "random-a": ("random-a", {}),
    "lora-null-v1": ("lora-null-v1", {}),
    "lora-null-v2": ("lora-null-v2", {}),
    "lora": ("lora", {}),
}


def randomise(model):
    """Values for everything trainable, as training would leave them; what is constant stays."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                if hasattr(module, "trained"):
                    noise.tensor_split([module.trained], dim=module.dim)[1].zero_()
                parameter.data.add_(noise)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("llama", variant) for variant in VARIANTS), *(("llava", variant) for variant in ("kore", "energy-train-a"))],
)
def test_every_adapter_is_a_stock_peft_adapter_that_says_what_it_is(variant, kind, covariances, tmp_path):
    from peft import PeftModel

    method, options = VARIANTS[variant]
    options = {"rank": RANK, **options}
    batch, cov = make_batch(kind), covariances[kind]
    model = baselines.prepare_model(MODELS[kind](), method, cov, progress=False, **options).eval()
    torch.testing.assert_close(logits(model, batch), logits(MODELS[kind](), batch), rtol=0, atol=5e-6)
    model.kore_info["recipe"] = {"name": "default", "changed": {"adapter.rank": RANK}}
    randomise(model)
    expected = logits(model, batch)
    assert (expected - logits(MODELS[kind](), batch)).abs().max() > 1e-3
    save_adapter(model, tmp_path / "a")
    stock = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "a").eval()
    torch.testing.assert_close(logits(stock, batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(stock.merge_and_unload(), batch), expected, rtol=0, atol=1e-5)
    loaded = load_kore_model(MODELS[kind](), tmp_path / "a", trainable=True).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=0)
    flags = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert flags[0] == flags[1]
    save_adapter(loaded, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors", "kore.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    info = json.loads((tmp_path / "b" / "kore.json").read_text())
    assert info["method"] == method and info["recipe"]["name"] == "default"
    assert {key: info["config"][key] for key in options} == options
    if method in baselines.NULL_SPACE:
        origin = {"selection": "all", "normalize": "none", "dtype": "float32", "merged_from": None}
        assert info["covariance"] == {"tokens": cov.groups[0].tokens, **origin}
