"""Solvers for the smallest eigenvectors of a symmetric positive semi-definite float64 matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns beyond the rank: the first block then reaches past the directions that are wanted.
_LEAST_EXTRA, _EXTRA_SHARE = 32, 8
# Random vectors that measure the excess energy.
_PROBES = 16
# The first shift, in units of the rounding of the equilibrated matrix, and how it grows until a factor exists.
_SHIFT, _SHIFT_GROWTH = 0.004, 5.0


def solve_eigh(C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (d, r) and the r smallest eigenvalues, from the full eigendecomposition of C."""
    eigenvalues, vectors = torch.linalg.eigh(C)
    return vectors[:, :rank].clone(), eigenvalues[:rank].clone()


def solve_svd(C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (d, r) of float32's SVD, orthonormal to float32, as float64; and the r smallest eigenvalues of C, not of U."""
    U = torch.linalg.svd(C.float()).U[:, -rank:].flip(1)
    return U.to(C.dtype), torch.linalg.eigvalsh(C)[:rank]


def block_columns(d: int, rank: int) -> int:
    """r + p, the columns of a block of the randomized solver."""
    return min(d, rank + max(_LEAST_EXTRA, rank // _EXTRA_SHARE))


@dataclass(frozen=True)
class Randomized:
    """What the randomized solver found.

    Attributes:
        basis: U (d, r), orthonormal columns.
        excess: Estimate of (tr(UᵀCU) − Σλ) / tr(UᵀCU), Σλ the smallest possible sum; 0 within the rounding of C.
        converged: Whether that is within the tolerance.
        iterations: Blocks of the Krylov space.
    """

    basis: Tensor
    excess: float
    converged: bool
    iterations: int


def solve_randomized(
    C: Tensor, rank: int, seed: int, tolerance: float, max_iterations: int, epsilon: float
) -> Randomized:
    """U (d, r) from a randomized block Krylov space of M = (C + σD)⁻¹, D the diagonal of C, by Rayleigh–Ritz.

    A random block of r + p columns is taken through M, M², …, by one Cholesky factorisation; each block is made
    orthonormal to those before it, and U are the Ritz vectors of C itself in the space of all blocks (Musco and Musco
    2015, with M in place of C). So neither the shift nor the scaling biases the result.

    The excess energy of U is that of its residuals R = CU − Uθ in the metric of M, tr(RᵀMR) to second order, of each
    Ritz vector over 1 − θ_i/θ_{r+p} for the part of M that its own eigenvalue takes away. It is estimated from 16
    random combinations of the residuals (Hutchinson), one small solve, instead of bounded by ‖R‖², which ignores
    in which directions the residuals lie and asks for up to twice as many blocks.

    Args:
        C: (d, d) float64, symmetric; not changed.
        rank: r.
        seed: Of the first block and the probes.
        tolerance: Of the excess.
        max_iterations: The most blocks.
        epsilon: Relative rounding of the entries of C, which may be that of a narrower dtype they came from.
    """
    d, columns = C.shape[0], block_columns(C.shape[0], rank)
    trace = float(C.diagonal().sum())
    if trace <= 0:
        return Randomized(torch.eye(d, rank, dtype=C.dtype, device=C.device), 0.0, True, 0)
    noise = torch.finfo(C.dtype).eps * trace
    inverse = _ShiftedInverse(C, epsilon)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d, columns, dtype=C.dtype, generator=generator).to(C.device)
    probes = torch.randn(rank, _PROBES, dtype=C.dtype, generator=generator).to(C.device)
    K, T = C.new_empty(d, 0), C.new_empty(0, 0)
    U, excess, converged, iteration = X[:, :rank], float("inf"), False, 0
    for iteration in range(1, max_iterations + 1):  # noqa: B007
        X = _orthonormal(inverse(X)[:, : d - K.shape[1]], K)
        CX = C @ X
        side = K.mT @ CX
        T = torch.cat([torch.cat([T, side], dim=1), torch.cat([side.mT, X.mT @ CX], dim=1)])
        K = torch.cat([K, X], dim=1)
        theta, rotation = torch.linalg.eigh(T)
        U, ritz = K @ rotation[:, :rank], theta[:rank]
        outside = theta[min(columns, theta.numel()) - 1]
        if K.shape[1] == d or float(outside) <= 4 * noise:
            excess = 0.0
        else:
            weights = probes * (1 - ritz / outside).clamp_min(0.1).rsqrt()[:, None]
            R = C @ (U @ weights) - U @ (ritz[:, None] * weights)
            excess = float((R * inverse.solve(R)).sum()) / _PROBES / max(float(ritz.abs().sum()), rank * noise)
        converged = excess <= tolerance
        if converged:
            break
    return Randomized(U, excess, converged, iteration)


def _orthonormal(X: Tensor, K: Tensor) -> Tensor:
    """An orthonormal basis of what the columns of X add to those of the orthonormal K."""
    for _ in range(2):
        X = torch.linalg.qr(X - K @ (K.mT @ X)).Q
    return X


class _ShiftedInverse:
    """X ↦ (C + σD)⁻¹ X through a Cholesky factor of D^-½ C D^-½ + σI, D the diagonal of C.

    σ starts at a share of ``epsilon`` √d, the rounding of the equilibrated matrix, and grows until a factor exists,
    which for rounded or rank-deficient C takes a few tries.
    """

    def __init__(self, C: Tensor, epsilon: float) -> None:
        diagonal = C.diagonal()
        scale = diagonal.clamp_min(epsilon * float(diagonal.mean())).rsqrt()
        self._scale = scale[:, None]
        shift = _SHIFT * epsilon * C.shape[0] ** 0.5
        while True:
            H = (C * self._scale).mul_(scale)
            H.diagonal().add_(shift)
            # H is symmetric: its transpose is itself in the layout that LAPACK overwrites.
            info = torch.empty((), dtype=torch.int32, device=C.device)
            torch.linalg.cholesky_ex(H.mT, out=(H.mT, info))
            if int(info) == 0:
                break
            shift *= _SHIFT_GROWTH
        self._factor = H.mT

    def solve(self, X: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._factor, X * self._scale, upper=False)
        return torch.linalg.solve_triangular(self._factor.mT, half, upper=True).mul_(self._scale)

    def __call__(self, X: Tensor) -> Tensor:
        """The same with columns of length 1, between the uses of which nothing overflows."""
        Y = self.solve(X)
        return Y.div_(torch.linalg.vector_norm(Y, dim=0))
