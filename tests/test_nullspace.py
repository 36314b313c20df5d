"""The null-space solvers against float64 eigenvalues, over hard spectra."""

from __future__ import annotations

import pytest
import torch

from kore.errors import KoreError
from kore.nullspace import energy_ratio, null_space


def graded(d: int, condition: float, outliers: int = 3, seed: int = 0) -> torch.Tensor:
    """Eigenvalues over ``condition`` orders of magnitude, and some channels with 60 times the amplitude."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    values = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), d, dtype=torch.float64)
    scale = torch.ones(d, dtype=torch.float64)
    scale[torch.randperm(d, generator=generator)[:outliers]] = 60
    C = ((Q * values) @ Q.T) * scale * scale[:, None]
    return (C + C.T) / 2


def from_tokens(tokens: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(tokens, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


def check(ns, C, rank, largest_ratio):
    d = C.shape[0]
    assert ns.basis.shape == (d, rank) and ns.basis.dtype == ns.eigenvalues.dtype == torch.float64
    torch.testing.assert_close(ns.basis.T @ ns.basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    rayleigh = (ns.basis * (C.double() @ ns.basis)).sum(dim=0)
    torch.testing.assert_close(ns.eigenvalues, rayleigh, rtol=1e-9, atol=1e-12 * float(C.double().trace()))
    ratio = energy_ratio(C, ns.basis)
    assert ratio <= largest_ratio
    if ns.method == "eigh":
        assert ns.energy_ratio == pytest.approx(ratio, abs=1e-2)
    else:
        assert 1 <= ns.energy_ratio <= 1.02 and ratio <= ns.energy_ratio + max(2e-3, largest_ratio - 1.02)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6, 1e12])
@pytest.mark.parametrize(("d", "rank"), [(1, 1), (17, 5), (300, 31), (300, 300)])
def test_eigh(d, rank, condition):
    C = graded(d, condition, outliers=min(3, d // 4))
    check(null_space(C, rank, "eigh"), C, rank, 1.0001)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6, 1e12])
def test_randomized_on_graded_spectra_with_outlier_channels(condition):
    C = graded(400, condition)
    ns = null_space(C, 50, "randomized")
    check(ns, C, 50, 1.02)
    assert ns.method == "randomized" and ns.iterations > 0


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
def test_close_to_the_optimum_by_default(condition, stored):
    """Also where float32 has rounded the small eigenvalues to noise, some of it negative."""
    C = graded(520, condition).to(stored)
    ns = null_space(C, 40)
    noise = bool(torch.linalg.eigvalsh(C.double())[:40].sum() < 0)
    assert noise == (condition == 1e12 and stored == torch.float32)
    check(ns, C, 40, 1.2 if noise else 1.02)
    assert ns.method == "randomized"


@pytest.mark.parametrize("tokens", [300, 520, 600, 2000])
def test_spectra_without_a_gap(tokens):
    C = from_tokens(tokens, 520)
    ns = null_space(C, 40, "randomized")
    assert energy_ratio(C, ns.basis) <= (1.02 if tokens > 520 else 3)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
def test_never_worse_than_float32_svd_of_the_same_matrix(condition):
    C = graded(300, condition)
    U = torch.linalg.svd(C.float()).U[:, -40:].double()
    official = energy_ratio(C, torch.linalg.qr(U).Q)
    svd = null_space(C, 40, "svd")
    assert torch.equal(svd.basis, U.flip(1)) and svd.energy_ratio == pytest.approx(official, rel=1e-3)
    assert svd.method == "svd" and svd.iterations == 0
    for method in ("eigh", "randomized"):
        assert energy_ratio(C, null_space(C, 40, method).basis) <= max(official, 1.02)


@pytest.mark.parametrize("method", ["eigh", "randomized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [20, 150, 190])
def test_rank_deficient(method, dtype, rank):
    C = from_tokens(50, 200, dtype=dtype)  # a null space of 150 directions
    ns = null_space(C, rank, method)
    check(ns, C, rank, 1.5 if rank <= 150 else 1.02)
    assert ns.null_dim == min(rank, 150)
    leak = float(ns.eigenvalues[: min(rank, 150)].sum() / C.double().trace())
    assert leak < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("method", ["auto", "eigh", "randomized"])
def test_zero(method):
    ns = null_space(torch.zeros(9, 9), 4, method)
    check(ns, torch.zeros(9, 9), 4, 1.0)
    assert ns.null_dim == 4 and ns.residual == 0


@pytest.mark.parametrize("method", ["eigh", "randomized"])
def test_dead_channels_are_found_exactly(method):
    C = torch.zeros(120, 120, dtype=torch.float64)
    C[:100, :100] = from_tokens(500, 100)
    ns = null_space(C, 20, method)
    assert float(ns.basis[:100].abs().max()) < 1e-7 and ns.null_dim == 20


@pytest.mark.parametrize("method", ["eigh", "randomized"])
def test_tiny_negative_eigenvalues(method):
    C = graded(200, 1e12).float()
    assert float(torch.linalg.eigvalsh(C.double())[0]) < 0
    check(null_space(C, 30, method), C, 30, 1.02)


def test_auto_chooses_by_size_and_falls_back():
    assert null_space(graded(60, 1e3), 5).method == "eigh"
    assert null_space(graded(600, 1e3), 20).method == "randomized"
    assert null_space(graded(600, 1e3), 300).method == "eigh"
    C = from_tokens(2000, 600)  # without decay: converges slowly
    assert null_space(C, 20, max_iterations=4, tolerance=1e-9).method == "eigh"
    with pytest.warns(UserWarning, match="stopped after 5 iterations"):
        assert null_space(C, 20, "randomized", max_iterations=5, tolerance=1e-9).method == "randomized"


@pytest.mark.parametrize(
    ("condition", "stored", "tried"),
    [
        (1e3, torch.float32, {torch.float32}),
        (1e12, torch.float32, {torch.float32, torch.float64}),
        (1e3, torch.float64, {torch.float64}),
    ],
)
def test_the_factor_is_in_float32_where_that_rounding_allows_it(monkeypatch, condition, stored, tried):
    from kore.nullspace import solvers

    seen, cholesky = set(), solvers._cholesky
    monkeypatch.setattr(
        solvers, "_cholesky", lambda C, scale, shift: (seen.add(scale.dtype), cholesky(C, scale, shift))[1]
    )
    C = graded(300, condition).to(stored)
    check(null_space(C, 30, "randomized"), C, 30, 1.02)
    assert seen == tried


def test_deterministic_and_seeded():
    C = graded(200, 1e3)
    first, again, other = (null_space(C, 20, "randomized", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.basis, again.basis) and not torch.equal(first.basis, other.basis)
    state = torch.get_rng_state()
    null_space(C, 20, "randomized")
    assert torch.equal(state, torch.get_rng_state())


def test_the_matrix_is_not_changed():
    C = graded(100, 1e3)
    before = C.clone()
    null_space(C, 10, "randomized"), null_space(C, 10, "eigh")
    assert torch.equal(C, before)


@pytest.mark.parametrize(
    ("C", "rank", "message"),
    [
        (torch.eye(4), 5, "from 1 to d = 4"),
        (torch.eye(4), 0, "from 1 to d = 4"),
        (torch.eye(4), 2.0, "rank: expected an integer"),
        (torch.zeros(4, 3), 1, r"expected a floating-point \(d, d\)"),
        (torch.eye(4, dtype=torch.long), 1, "int64"),
        (torch.full((2, 2), float("nan")), 1, "NaN or infinity"),
        (torch.tensor([[1.0, 0.0], [5.0, 1.0]]), 1, "symmetrize_"),
    ],
)
def test_wrong_arguments(C, rank, message):
    with pytest.raises(KoreError, match=message):
        null_space(C, rank)
    with pytest.raises(KoreError, match="method"):
        null_space(torch.eye(4), 1, "qr")
