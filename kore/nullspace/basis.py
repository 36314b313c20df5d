"""The null space of a covariance: an orthonormal basis of the directions that old inputs use least."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

from kore.errors import KoreError
from kore.nullspace.solvers import block_columns, solve_randomized, solve_svd

METHODS = ("auto", "eigh", "randomized", "svd")

# Rough operation counts: of eigh in units of d³, of the randomized solver's usual course in units of d² times the
# columns of a block, and how many blocks it keeps. Fitted to times on a CPU.
_EIGH_COST, _RANDOMIZED_COST, _BLOCKS = 11.0, 30.0, 2
_EIGH_MAX_DIM = 256
_TILE = 1024


@dataclass(frozen=True)
class NullSpace:
    """The r directions of smallest energy of a covariance C (d, d).

    Attributes:
        basis: U (d, r), float64, orthonormal columns (of ``"svd"`` to the rounding of float32).
        eigenvalues: (r,) float64, ascending: uᵀCu of every column, so tr(UᵀCU) is their sum.
        energy_ratio: E(U), see :func:`energy_ratio`; 1 is perfect. Exact from eigh and svd. From the randomized
            solver, which does not compute the spectrum, an estimate from the residuals; it tends to be above E.
        residual: ‖CU − U diag(eigenvalues)‖_F / ‖C‖_F.
        null_dim: How many of the r directions carry no energy above the rounding of C: uᵀCu ≤ ε tr(C), with ε of
            the dtype in which C was given.
        method: ``"eigh"``, ``"randomized"`` or ``"svd"``, the solver that ran.
        iterations: Products with the shifted inverse in the randomized solver; 0 for the others.
    """

    basis: torch.Tensor
    eigenvalues: torch.Tensor
    energy_ratio: float
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
    tolerance: float = 1e-2,
    max_iterations: int = 14,
) -> NullSpace:
    """U (d, r), an orthonormal basis of the r smallest eigenvectors of C (arXiv 2510.19316).

    The arithmetic is float64 whatever the dtype of C, because the small eigenvalues of a covariance lie far below
    the rounding of its large ones in float32.

    Args:
        C: Symmetric positive semi-definite (d, d), any floating dtype, not changed. Zero, rank-deficient and
            slightly indefinite (by rounding) matrices are fine.
        rank: r, from 1 to d.
        method: ``"eigh"``; ``"randomized"``, a block Krylov space of the shifted inverse, for r well below d;
            ``"auto"``, whichever is expected to take fewer operations, with eigh where the randomized solver does
            not converge; ``"svd"``, the last left singular vectors of C in float32, as the official code takes them,
            whatever that rounding does to them.
        seed: Of the randomized solver's start.
        tolerance: The randomized solver stops when the excess of its energy, relative to the energy found and
            estimated from the residuals, is at most this.
        max_iterations: Of the randomized solver, at least 4.

    Peak memory beside C: with eigh about four, with the randomized solver two matrices (d, d) in float64, and its
    blocks.

    Raises:
        KoreError: C is not a finite symmetric matrix, or rank is not in 1..d.
    """
    _check(C, rank, method)
    epsilon = torch.finfo(C.dtype).eps
    C = C.detach().to(torch.float64)
    if method == "randomized" or (method == "auto" and not _eigh_is_cheaper(C.shape[0], rank)):
        found = solve_randomized(C, rank, seed, tolerance, max_iterations, epsilon)
        if found.converged or method == "randomized":
            if not found.converged:
                warnings.warn(
                    f"null_space: the randomized solver stopped after {found.iterations} iterations above its "
                    "tolerance; use method='eigh' or more iterations",
                    stacklevel=2,
                )
            ratio = 1.0 / (1.0 - found.excess) if found.excess < 1.0 else float("inf")
            return _measured(C, found.basis, found.product, ratio, "randomized", epsilon, found.iterations)
    if method == "svd":
        basis, smallest = solve_svd(C, rank)
    else:
        method, (smallest, vectors) = "eigh", torch.linalg.eigh(C)
        basis, smallest = vectors[:, :rank].clone(), smallest[:rank]
    return _exact(C, basis, smallest, method, epsilon)


def energy_space(C: torch.Tensor, share: float) -> NullSpace:
    """The largest null space that holds less than a share of the energy: Σ(r smallest eigenvalues) < τ tr(C).

    The whole spectrum is computed in float64, by eigh; negative eigenvalues, which are rounding, count as 0.

    Args:
        C: As for :func:`null_space`. The rank of C = 0 is d; at least one direction is taken.
        share: τ.

    Raises:
        KoreError: C is not a finite symmetric matrix.
    """
    _check(C, 1, "eigh")
    epsilon = torch.finfo(C.dtype).eps
    C = C.detach().to(torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(C)
    trace = float(C.diagonal().sum())
    quiet = eigenvalues.clamp_min(0).cumsum(0) < share * trace
    rank = max(1, int(quiet.sum())) if trace > 0 else C.shape[0]
    return _exact(C, vectors[:, :rank].clone(), eigenvalues[:rank], "eigh", epsilon)


def _exact(C: torch.Tensor, basis: torch.Tensor, smallest: torch.Tensor, method: str, epsilon: float) -> NullSpace:
    product = C @ basis
    ratio = _ratio(float((basis * product).sum()), float(smallest.sum()), basis.shape[1], float(C.diagonal().sum()))
    return _measured(C, basis, product, ratio, method, epsilon, 0)


def _measured(
    C: torch.Tensor,
    basis: torch.Tensor,
    product: torch.Tensor,
    ratio: float,
    method: str,
    epsilon: float,
    iterations: int,
) -> NullSpace:
    eigenvalues = (basis * product).sum(dim=0)
    norm = float(torch.linalg.matrix_norm(C))
    return NullSpace(
        basis=basis,
        eigenvalues=eigenvalues,
        energy_ratio=ratio,
        residual=float(torch.linalg.matrix_norm(product - basis * eigenvalues)) / norm if norm else 0.0,
        null_dim=int((eigenvalues <= epsilon * float(C.diagonal().sum())).sum()),
        method=method,
        iterations=iterations,
    )


def _eigh_is_cheaper(d: int, rank: int) -> bool:
    columns = block_columns(d, rank)
    krylov = min(d, _BLOCKS * columns)
    randomized = d**3 / 3 + _RANDOMIZED_COST * d**2 * columns + _EIGH_COST * krylov**3
    return d <= _EIGH_MAX_DIM or _EIGH_COST * d**3 <= randomized


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
    least, most = (float(bound) for bound in torch.aminmax(C))
    if not math.isfinite(least) or not math.isfinite(most):
        raise KoreError("C: holds NaN or infinity; capture the covariance again")
    if _asymmetry(C) > 1e-4 * max(abs(least), abs(most)):
        raise KoreError("C: is not symmetric; mirror its lower triangle with kore_kernels.symmetrize_ first")


def _asymmetry(C: torch.Tensor) -> float:
    """max |C − Cᵀ|, a tile and its mirror image at a time."""
    starts = range(0, C.shape[0], _TILE)
    differences = [
        (C[i : i + _TILE, j : j + _TILE] - C[j : j + _TILE, i : i + _TILE].mT).abs().amax()
        for i in starts
        for j in starts
        if j <= i
    ]
    return float(torch.stack(differences).max())
