"""The null space of a covariance: an orthonormal basis of the directions that old inputs use least."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from kore.errors import KoreError
from kore.nullspace.solvers import solve_eigh, solve_randomized

METHODS = ("auto", "eigh", "randomized")
_EIGH_MAX_DIM = 1024


@dataclass(frozen=True)
class NullSpace:
    """The r directions of smallest energy of a covariance C (d, d).

    Attributes:
        basis: U (d, r), float64, orthonormal columns.
        eigenvalues: (r,) float64, ascending: uᵀCu of every column, so tr(UᵀCU) is their sum.
        energy_ratio: E(U), see :func:`energy_ratio`; 1 is perfect. None where the solver did not compute the
            spectrum (randomized): the eigenvalues found are upper bounds of the true ones, so E cannot be had
            from them.
        residual: ‖CU − U diag(eigenvalues)‖_F / ‖C‖_F.
        null_dim: How many of the r directions carry no energy above the rounding of C: uᵀCu ≤ ε tr(C), with ε of
            the dtype in which C was given.
        method: ``"eigh"`` or ``"randomized"``, the solver that ran.
        iterations: Of the randomized solver; 0 for eigh.
    """

    basis: torch.Tensor
    eigenvalues: torch.Tensor
    energy_ratio: float | None
    residual: float
    null_dim: int
    method: str
    iterations: int


def null_space(
    C: torch.Tensor,
    rank: int,
    method: str = "auto",
    seed: int = 0,
    *,
    tolerance: float = 2e-3,
    max_iterations: int = 30,
) -> NullSpace:
    """U (d, r), an orthonormal basis of the r smallest eigenvectors of C (arXiv 2510.19316).

    The arithmetic is float64 whatever the dtype of C, because the small eigenvalues of a covariance lie far below
    the rounding of its large ones in float32.

    Args:
        C: Symmetric positive semi-definite (d, d), any floating dtype, not changed. Zero, rank-deficient and
            slightly indefinite (by rounding) matrices are fine.
        rank: r, from 1 to d.
        method: ``"eigh"``; ``"randomized"``, shifted inverse subspace iteration, for r well below d;
            ``"auto"``, eigh up to d = 1024 or above r = d / 4, else randomized, with eigh where that does not
            converge.
        seed: Of the randomized solver's start.
        tolerance: The randomized solver stops when the residuals bound its excess energy, relative to the energy
            found, by this.
        max_iterations: Of the randomized solver.

    Raises:
        KoreError: C is not a finite symmetric matrix, or rank is not in 1..d.
    """
    _check(C, rank, method)
    epsilon = torch.finfo(C.dtype).eps
    C = C.detach().to(torch.float64)
    d = C.shape[0]
    if method == "auto":
        method = "eigh" if d <= _EIGH_MAX_DIM or 4 * rank > d else "randomized"
        fallback = True
    else:
        fallback = False
    trace, smallest_sum, iterations = float(C.diagonal().sum()), None, 0
    if method == "randomized":
        solution = solve_randomized(C, rank, seed, tolerance, max_iterations)
        if solution.converged or not fallback:
            basis, iterations = solution.basis, solution.iterations
            if not solution.converged:
                warnings.warn(
                    f"null_space: the randomized solver stopped after {iterations} iterations above its tolerance; "
                    "use method='eigh' or more iterations",
                    stacklevel=2,
                )
        else:
            method = "eigh"
    if method == "eigh":
        basis, smallest = solve_eigh(C, rank)
        smallest_sum = float(smallest.sum())
    product = C @ basis
    eigenvalues = (basis * product).sum(dim=0)
    norm = float(torch.linalg.matrix_norm(C))
    residual = float(torch.linalg.matrix_norm(product - basis * eigenvalues)) / norm if norm else 0.0
    return NullSpace(
        basis=basis,
        eigenvalues=eigenvalues,
        energy_ratio=None if smallest_sum is None else _ratio(float(eigenvalues.sum()), smallest_sum, rank, trace),
        residual=residual,
        null_dim=int((eigenvalues <= epsilon * trace).sum()),
        method=method,
        iterations=iterations,
    )


def energy_ratio(C: torch.Tensor, basis: torch.Tensor) -> float:
    """E(U) = tr(UᵀCU) / Σ(r smallest eigenvalues of C), both in float64; 1 is perfect.

    Where the smallest eigenvalues are zero to rounding or negative by it, their sum s stands in no useful ratio,
    and E = 1 + (tr(UᵀCU) − s) / max(|s|, r ε tr(C)); elsewhere this is the same number.

    Args:
        C: Symmetric (d, d), any floating dtype. Its whole spectrum is computed.
        basis: U (d, r), orthonormal columns.
    """
    C, basis = C.detach().to(torch.float64), basis.to(torch.float64)
    rank = basis.shape[1]
    smallest = torch.linalg.eigvalsh(C)[:rank]
    energy = float((basis * (C @ basis)).sum())
    return _ratio(energy, float(smallest.sum()), rank, float(C.diagonal().sum()))


def _ratio(energy: float, smallest: float, rank: int, trace: float) -> float:
    scale = max(abs(smallest), rank * torch.finfo(torch.float64).eps * trace)
    return 1.0 + (energy - smallest) / scale if scale > 0 else 1.0


def _check(C: torch.Tensor, rank: int, method: str) -> None:
    if method not in METHODS:
        raise KoreError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if C.dim() != 2 or C.shape[0] != C.shape[1] or not C.is_floating_point():
        raise KoreError(f"C: expected a floating-point (d, d) matrix, got {C.dtype} {tuple(C.shape)}")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= C.shape[0]:
        raise KoreError(f"rank: expected an integer from 1 to d = {C.shape[0]}, got {rank!r}")
    if not bool(torch.isfinite(C).all()):
        raise KoreError("C: holds NaN or infinity; capture the covariance again")
    asymmetry, scale = float((C - C.mT).abs().max()), float(C.abs().max())
    if asymmetry > 1e-4 * scale:
        raise KoreError("C: is not symmetric; mirror its lower triangle with kore_kernels.symmetrize_ first")
