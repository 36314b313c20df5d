"""The exact identities the library is built on, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from kore.adapter import KoreConfig, get_kore_model, thin_init
from kore.capture import capture_covariance
from kore.nullspace import null_space
from tests.batches import MODELS, make_batches


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def official_factors(W0, C, rank):
    """B₀ and A of the paper, by a full svd of C and a full svd of W0 P."""
    U = torch.linalg.svd(C).U[:, -rank:]
    left, singular, right = torch.linalg.svd(W0 @ U @ U.T, full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(24, 16, 5), (16, 24, 5), (7, 24, 7), (24, 16, 16)])
def test_thin_initialisation_is_the_papers(d_out, d_in, rank):
    W0, x = randn(d_out, d_in), randn(200, d_in, seed=1)
    C = x.T @ x
    B0, A = official_factors(W0, C, rank)
    ours = thin_init(W0, null_space(C, rank).basis)
    signs = (ours * A).sum(dim=1).sign()
    torch.testing.assert_close(signs[:, None] * ours, A, rtol=0, atol=1e-13 * float(A.abs().max()) * 10)
    U = null_space(C, rank).basis
    torch.testing.assert_close(B0 @ A, W0 @ U @ U.T, rtol=0, atol=1e-13)
    rows = thin_init(W0, U, "orthonormal")
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(rows @ U @ U.T, rows, rtol=0, atol=1e-14)


def test_fewer_outputs_than_rank_gives_no_dead_rows():
    W0, U = randn(3, 20), torch.linalg.qr(randn(20, 8, seed=1)).Q
    A = thin_init(W0, U)
    norms = A.norm(dim=1)
    singular = torch.linalg.svdvals(W0 @ U)
    torch.testing.assert_close(norms[:3], singular.sqrt(), rtol=0, atol=1e-13)
    torch.testing.assert_close(norms[3:], singular[-1].sqrt().expand(5), rtol=0, atol=1e-13)
    torch.testing.assert_close(A @ U @ U.T, A, rtol=0, atol=1e-13)
    assert int(torch.linalg.matrix_rank(A)) == 8
    torch.testing.assert_close(thin_init(torch.zeros(3, 20), U).norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_zero_residual_form_same_outputs_and_same_gradient_of_b():
    W0, A, B0, delta = randn(12, 20), randn(5, 20, seed=1), randn(12, 5, seed=2), randn(12, 5, seed=3)
    x, target = randn(30, 20, seed=4), randn(30, 12, seed=5)
    residual = W0 - B0 @ A
    B_official, B_ours = (B0 + delta).requires_grad_(), delta.clone().requires_grad_()
    y_official = F.linear(x, residual) + F.linear(F.linear(x, A), B_official)
    y_ours = F.linear(x, W0) + F.linear(F.linear(x, A), B_ours)
    torch.testing.assert_close(y_ours, y_official, rtol=0, atol=1e-13 * 10)
    for y in (y_official, y_ours):
        (y - target).square().mean().backward()
    torch.testing.assert_close(B_ours.grad, B_official.grad, rtol=1e-12, atol=1e-14)


def test_shared_basis_every_factor_is_a_small_matrix_times_the_groups_basis():
    x = randn(100, 20)
    U = null_space(x.T @ x, 6).basis
    for seed, d_out in enumerate((20, 8, 4)):
        A = thin_init(randn(d_out, 20, seed=seed), U)
        R = A @ U
        torch.testing.assert_close(R @ U.T, A, rtol=0, atol=1e-14 * 100)
        torch.testing.assert_close((x @ U) @ R.T, x @ A.T, rtol=0, atol=1e-13 * 10)


def test_100_adamw_steps_equal_the_official_residual_form_on_a_model():
    rank, batches = 6, make_batches("llama", 5)
    base = MODELS["llama"]().double()
    cov = capture_covariance(base, batches, dtype=torch.float64)
    official, factors = copy.deepcopy(base), {}
    ours = get_kore_model(copy.deepcopy(base), cov, KoreConfig(rank=rank))
    for name in cov.modules:
        linear = official.get_submodule(name)
        B0, A = official_factors(linear.weight.detach(), cov[name], rank)
        # The signs of singular vectors are free: take those of ours.
        mine = ours.get_base_model().get_submodule(name).lora_A["default"].weight.detach()
        signs = (A * mine).sum(dim=1).sign()
        torch.testing.assert_close(A * signs[:, None], mine, rtol=0, atol=1e-9)
        B, A = B0 * signs, mine
        linear.weight.data -= B @ A
        factors[name] = (B.requires_grad_(), A)
        linear.register_forward_hook(lambda module, args, out, B=B, A=A: out + F.linear(F.linear(args[0], A), B))
    official.requires_grad_(False)
    for B, _ in factors.values():
        B.requires_grad_()

    def train(model, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
        for step in range(100):
            loss = model(**batches[step % len(batches)]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    first_loss = ours(**batches[0]).loss.item()
    loss_ours = train(ours, [p for p in ours.parameters() if p.requires_grad])
    loss_official = train(official, [B for B, _ in factors.values()])
    assert loss_ours == pytest.approx(loss_official, abs=1e-10) and loss_ours < first_loss - 0.1
    for name, (B, A) in factors.items():
        layer = ours.get_base_model().get_submodule(name)
        ours_weight = layer.weight + layer.get_delta_weight("default")
        official_weight = official.get_submodule(name).weight + B @ A
        torch.testing.assert_close(ours_weight, official_weight, rtol=0, atol=1e-10)
        assert float((ours_weight - base.get_submodule(name).weight).detach().abs().max()) > 1e-3
