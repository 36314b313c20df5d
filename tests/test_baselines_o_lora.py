"""O-LoRA: the overlap of two adapters, its gradient, and where the adapter before comes from."""

from __future__ import annotations

import math

import pytest
import torch

from kore.baselines import baseline, prepare_model
from kore.baselines.previous import Previous, PreviousOptions
from kore.capture import capture_covariance
from kore.data import load_conversations
from kore.errors import ConfigError
from kore.penalty import Start
from kore.protection.adapted import Factors, adapted_layers
from kore.protection.subspace import FORMS, Orthogonality, overlap
from kore.training import train
from tests.batches import MODELS, make_batches
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import prepared

QUICK = dict(batch_size=8, logging_steps=1, save_steps=None, report_to=[], progress=False, warmup_ratio=0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows, d, seed=0):
    return torch.linalg.qr(normal(d, rows, seed=seed))[0].T


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_paid_in_the_null_space_of_the_one_before(form):
    old, new = normal(5, 30), normal(4, 30, seed=1)
    basis = torch.linalg.qr(old.T)[0]
    new = (new - new @ basis @ basis.T).requires_grad_()
    value = overlap(new, old, form)
    assert float(value.detach()) < 1e-13
    if form != "absolute":  # whose gradient is a sign, of whatever size the product is
        (gradient,) = torch.autograd.grad(value, new)
        assert gradient.abs().max() < 1e-13


def test_gradients_are_those_of_the_formulas():
    old, new = normal(5, 30), normal(4, 30, seed=1).requires_grad_()
    M = (new @ old.T).detach()
    (squared,) = torch.autograd.grad(overlap(new, old, "squared"), new)
    (absolute,) = torch.autograd.grad(overlap(new, old, "absolute"), new)
    torch.testing.assert_close(squared, 2 * M @ old, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(absolute, M.sign() @ old, rtol=0, atol=1e-14)
    n, share = new.detach().square().sum(), 4 / old.square().sum()
    (relative,) = torch.autograd.grad(overlap(new, old), new)
    expected = share * (2 * M @ old / n - 2 * M.square().sum() * new.detach() / n**2)
    torch.testing.assert_close(relative, expected, rtol=1e-13, atol=1e-15)


def test_of_orthonormal_rows_it_is_the_mean_cosine_squared_of_the_principal_angles():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    new, old = orthonormal(4, 30), orthonormal(6, 30, seed=1)
    cosines = torch.from_numpy(scipy_linalg.subspace_angles(new.T.numpy(), old.T.numpy())).cos()
    assert float(overlap(new, old, "squared")) == pytest.approx(float(cosines.square().sum()), rel=1e-12)
    # ‖A_new‖² ‖A_old‖² = 4 · 6
    assert float(overlap(new, old)) == pytest.approx(float(cosines.square().sum()) * 4 / 24, rel=1e-12)
    assert float(overlap(new, rotation(4) @ new)) == pytest.approx(1, rel=1e-14)
    by_chance = [float(overlap(normal(4, 30, seed=i), normal(4, 30, seed=1000 + i))) for i in range(200)]
    assert sum(by_chance) / 200 == pytest.approx(4 / 30, rel=0.1)


def test_only_the_span_of_the_one_before_counts_for_squares():
    old, new = orthonormal(5, 30), normal(4, 30, seed=1)
    mixed = rotation(5, seed=2) @ old
    for form in ("overlap", "squared"):
        torch.testing.assert_close(overlap(new, mixed, form), overlap(new, old, form), rtol=1e-13, atol=0)
    assert abs(float(overlap(new, mixed, "absolute") - overlap(new, old, "absolute"))) > 1e-2
    torch.testing.assert_close(overlap(new * 7, old / 3), overlap(new, old), rtol=1e-13, atol=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("o-lora")
    save_tiny("llava", root / "llava")
    tiny_conversations(root / "data", 8)
    tiny_conversations(root / "old", 6, text_only=True)
    return root


def data(root):
    return load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")


def old_data(root):
    return load_conversations(root / "old" / "conversations.json")


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_adapter_before_is_trained_on_old_data_and_everything_is_put_back(root, tmp_path):
    model, encoder = prepared("llava", root, "o-lora")
    before, info, modes = values(model), dict(model.kore_info), [module.training for module in model.modules()]
    start = Start(model, encoder, [], 8, tmp_path, lambda: 0.0, config=None)
    previous = Previous(PreviousOptions(previous_steps=2), encoder, old_data(root))
    factors = previous.factors(start)
    after = values(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert dict(model.kore_info) == info and modes == [module.training for module in model.modules()]
    assert (tmp_path / "previous" / "adapter" / "adapter_model.safetensors").is_file()
    plain, _ = prepared("llava", root, "lora")
    config = {"max_steps": 2, "report_to": []}
    train(plain, encoder, old_data(root), config, tmp_path / "plain")
    for name, layer in adapted_layers(plain).items():
        assert torch.equal(factors[name].A, layer.A) and torch.equal(factors[name].B, layer.B)
        assert factors[name].B.any()
    again = previous.factors(start)  # now read from the folder
    assert all(torch.equal(again[name].A, one.A) and torch.equal(again[name].B, one.B) for name, one in factors.items())
    assert all(torch.equal(values(model)[name], value) for name, value in before.items())


def test_weights_and_covariance_give_their_largest_directions():
    model = prepare_model(MODELS["llama"]().double(), "o-lora", rank=4)
    cov = capture_covariance(MODELS["llama"](), make_batches("llama", 4))
    start = Start(model, None, [], 1, None, None)
    options = baseline("o-lora", previous="weights").options
    for name, factors in Previous(options, None).factors(start).items():
        W = model.base_model.model.get_submodule(name).base_layer.weight.detach()
        singular = torch.linalg.svdvals(W)
        left = W - factors.B @ factors.A
        assert float(left.norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-12)
        torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(4).double(), rtol=0, atol=1e-13)
        torch.testing.assert_close((W @ factors.A.T).norm(dim=0), singular[:4], rtol=1e-12, atol=0)
    options = baseline("o-lora", previous="covariance").options
    for name, factors in Previous(options, None, (), cov).factors(start).items():
        C = cov[name].double()
        energy = (factors.A @ C @ factors.A.T).trace()
        assert float(energy) == pytest.approx(float(torch.linalg.eigvalsh(C)[-4:].sum()), rel=1e-12)
        assert factors.B is None
    assert not Previous(baseline("o-lora", previous="none").options, None).factors(start)


@pytest.mark.slow
def test_training_turns_away_from_the_one_before_and_starts_at_the_untouched_model(root, tmp_path):
    histories, trained = {}, {}
    for label, method, options in (
        ("lora", "lora", {}),
        ("none", "o-lora", {"previous": "none"}),
        ("0", "o-lora", {"previous": "weights", "strength": 0}),
        ("100", "o-lora", {"previous": "weights", "strength": 100}),
    ):
        model, encoder = prepared("llava", root, method)
        config = {**QUICK, "max_steps": 2, "learning_rate": 3e-2}
        penalty = baseline(method, **options).penalty(model, encoder)
        histories[label] = train(model, encoder, data(root), config, tmp_path / label, penalty=penalty).history
        trained[label] = {name: value for name, value in values(model).items() if "lora_" in name}
    losses = {label: [entry["loss"] for entry in history] for label, history in histories.items()}
    assert losses["none"] == losses["0"] == losses["lora"] and len(losses["lora"]) == 2
    assert all(torch.equal(trained["none"][name], value) for name, value in trained["lora"].items())
    assert histories["100"][-1]["old_overlap"] < histories["0"][-1]["old_overlap"] / 1.5
    first = histories["100"][0]
    assert first["penalty"] == pytest.approx(100 * first["old_overlap"], rel=1e-6)
    assert first["loss"] - first["penalty"] == pytest.approx(losses["lora"][0], rel=1e-5)


def test_the_mean_is_over_layers_and_sums_are_sums():
    model = prepare_model(MODELS["llama"](), "o-lora", rank=4)
    layers = adapted_layers(model)

    class Fixed:
        def factors(self, start):
            return {name: Factors(normal(3, layer.A.shape[1])) for name, layer in layers.items()}

    start = Start(model, None, [], 1, None, None)
    for form in FORMS:
        penalty = Orthogonality(Fixed(), 2.0, form)
        penalty.begin(start)
        expected = math.fsum(
            float(overlap(layer.A.detach().double(), normal(3, layer.A.shape[1]), form)) for layer in layers.values()
        )
        expected /= len(layers) if form == "overlap" else 1
        value = float(penalty.step().detach())
        assert value == pytest.approx(2 * expected, rel=1e-5)
        assert penalty.log() == {"old_overlap": pytest.approx(expected, rel=1e-5)}


def test_what_is_wrong_is_said(root, tmp_path):
    model, encoder = prepared("llava", root, "o-lora")
    with pytest.raises(ConfigError, match="method o-lora needs old conversations with answers"):
        baseline("o-lora").penalty(model, encoder)
    with pytest.raises(ConfigError, match="previous: covariance needs the result of kore capture"):
        baseline("o-lora", previous="covariance").penalty(model, encoder)
    with pytest.raises(ConfigError, match=r"options.previous: input should be 'adapter', 'weights'"):
        baseline("o-lora", previous="past")
    penalty = baseline("o-lora").penalty(model, encoder, old_data(root))
    with pytest.raises(ConfigError, match=r"previous: adapter is trained data-parallel, without fsdp"):
        config = {**QUICK, "fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}}
        from kore.training import TrainConfig

        penalty.begin(Start(model, encoder, [], 8, tmp_path, None, config=TrainConfig.of(config)))
    assert not baseline("o-lora", previous="weights").reads_old and baseline("o-lora").reads_old
