"""Solvers for the smallest eigenvectors of a symmetric positive semi-definite float64 matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns beyond the rank: the first block then reaches past the directions that are wanted.
_LEAST_EXTRA, _EXTRA_SHARE = 32, 8
# Powers of M before the first block that is kept, and blocks before the first test.
_POWERS, _KEPT = 2, 2
# Random vectors that measure the excess energy.
_PROBES = 16
# The first shift, in units of the rounding of the equilibrated matrix, and how it grows until a factor exists.
_SHIFT, _SHIFT_GROWTH = 0.004, 5.0
# The least share of the largest diagonal entry of a Cholesky factor of XᵀX that the smallest may be.
_WELL_CONDITIONED = 1e-5


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
        product: C U (d, r).
        excess: Estimate of (tr(UᵀCU) − Σλ) / tr(UᵀCU), Σλ the smallest possible sum; 0 within the rounding of C.
        converged: Whether that is within the tolerance.
        iterations: Products with the shifted inverse.
    """

    basis: Tensor
    product: Tensor
    excess: float
    converged: bool
    iterations: int


def solve_randomized(
    C: Tensor, rank: int, seed: int, tolerance: float, max_iterations: int, epsilon: float
) -> Randomized:
    """U (d, r) from a randomized block Krylov space of M = (C + σD)⁻¹, D the diagonal of C, by Rayleigh–Ritz.

    A random block of r + p columns is taken through M, M², …, by one Cholesky factorisation. From the third power on
    each block is made orthonormal to those before it and kept, and U are the Ritz vectors of C itself in the space
    of all kept blocks (Musco and Musco 2015, with M in place of C). So neither the shift nor the scaling biases the
    result. The first powers are a subspace iteration: they cost a solve each, a kept block twice that and more.

    The excess energy of U is that of its residuals R = CU − Uθ in the metric of M, tr(RᵀMR) to second order, of each
    Ritz vector over 1 − θ_i/θ_{r+p} for the part of M that its own eigenvalue takes away. It is estimated from 16
    random combinations of the residuals (Hutchinson), one small solve, instead of bounded by ‖R‖², which ignores
    in which directions the residuals lie and asks for up to twice as many blocks.

    Args:
        C: (d, d) float64, symmetric; not changed.
        rank: r.
        seed: Of the first block and the probes.
        tolerance: Of the excess.
        max_iterations: The most products with M, at least 4.
        epsilon: Relative rounding of the entries of C, which may be that of a narrower dtype they came from.
    """
    d, columns = C.shape[0], block_columns(C.shape[0], rank)
    trace = float(C.diagonal().sum())
    if trace <= 0:
        U = torch.eye(d, rank, dtype=C.dtype, device=C.device)
        return Randomized(U, C @ U, 0.0, True, 0)
    noise = torch.finfo(C.dtype).eps * trace
    inverse = _ShiftedInverse(C, epsilon)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d, columns, dtype=C.dtype, generator=generator).to(C.device)
    probes = torch.randn(rank, _PROBES, dtype=C.dtype, generator=generator).to(C.device)
    for _ in range(_POWERS):
        X = _orthonormal(inverse(X))
    K = CK = C.new_empty(d, 0)
    T = C.new_empty(0, 0)
    for iteration in range(_POWERS + 1, max(max_iterations, _POWERS + _KEPT) + 1):
        X = inverse(X)[:, : d - K.shape[1]]
        for _ in range(2):
            X = _orthonormal(X - K @ (K.mT @ X))
        CX = C @ X
        side = K.mT @ CX
        T = torch.cat([torch.cat([T, side], dim=1), torch.cat([side.mT, X.mT @ CX], dim=1)])
        K, CK = torch.cat([K, X], dim=1), torch.cat([CK, CX], dim=1)
        if iteration < _POWERS + _KEPT and K.shape[1] < d:
            continue
        theta, rotation = torch.linalg.eigh(T)
        ritz, outside = theta[:rank], theta[min(columns, theta.numel()) - 1]
        excess = 0.0
        if K.shape[1] < d and float(outside) > 4 * noise:
            weights = probes * (1 - ritz / outside).clamp_min(0.1).rsqrt()[:, None]
            R = CK @ (rotation[:, :rank] @ weights) - K @ (rotation[:, :rank] @ (ritz[:, None] * weights))
            excess = float((R * inverse.solve(R)).sum()) / _PROBES / max(float(ritz.abs().sum()), rank * noise)
        if excess <= tolerance:
            break
    U, product = K @ rotation[:, :rank], CK @ rotation[:, :rank]
    return Randomized(U, product, excess, excess <= tolerance, iteration)


def _orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis of the columns of X: by the Cholesky factor of XᵀX where it is well conditioned, else QR.

    The first is orthonormal only to the square of the condition of X, so of use for an X that is so nearly.
    """
    factor, info = torch.linalg.cholesky_ex(X.mT @ X)
    diagonal = factor.diagonal()
    if int(info) == 0 and float(diagonal.min()) > _WELL_CONDITIONED * float(diagonal.max()):
        return torch.linalg.solve_triangular(factor.mT, X, upper=True, left=False)
    return torch.linalg.qr(X).Q


class _ShiftedInverse:
    """X ↦ (C + σD)⁻¹ X through a Cholesky factor of H + σI, H = D^-½ C D^-½, D the diagonal of C.

    σ starts at a share of ``epsilon`` √d, the rounding of H. Where C has the rounding of float32, and no eigenvalue of
    H is as small as that, a factor in float32 is as good for the purpose and half the work. In float64 σ grows until
    there is a factor, which for rounded or rank-deficient C takes a few tries.
    """

    def __init__(self, C: Tensor, epsilon: float) -> None:
        scale = C.diagonal().clamp_min(epsilon * float(C.diagonal().mean())).rsqrt()
        shift = _SHIFT * epsilon * C.shape[0] ** 0.5
        factor = None
        if _float32_will_do(C, scale, shift, epsilon):
            factor = _cholesky(C, scale.float(), shift)
        while factor is None:
            factor = _cholesky(C, scale, shift)
            shift *= _SHIFT_GROWTH
        self._factor, self._scale = factor, scale[:, None]

    def solve(self, X: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._factor, (X * self._scale).to(self._factor.dtype), upper=False)
        return torch.linalg.solve_triangular(self._factor.mT, half, upper=True) * self._scale

    def __call__(self, X: Tensor) -> Tensor:
        """The same with columns of length 1, between the uses of which nothing overflows."""
        Y = self.solve(X)
        return Y.div_(torch.linalg.vector_norm(Y, dim=0))


def _float32_will_do(C: Tensor, scale: Tensor, shift: float, epsilon: float) -> bool:
    """Whether H will have a factor in float32, to save the work of finding out.

    Where the pivots of its first half end, squared, those of the whole will about end: exactly so for a geometric
    spectrum in random directions, earlier for a flatter one.
    """
    if epsilon < torch.finfo(torch.float32).eps:
        return False
    half = (C.shape[0] + 1) // 2
    factor = _cholesky(C[:half, :half], scale[:half].float(), shift)
    return factor is not None and float(factor.diagonal().min()) ** 4 > epsilon * C.shape[0] ** 0.5


def _cholesky(C: Tensor, scale: Tensor, shift: float) -> Tensor | None:
    """The lower factor of diag(scale) C diag(scale) + shift in the dtype of ``scale``; None where it has none."""
    H = torch.empty_like(C, dtype=scale.dtype)
    H.copy_(C).mul_(scale[:, None]).mul_(scale).diagonal().add_(shift)
    # H is symmetric: its transpose is itself in the layout that LAPACK overwrites.
    info = torch.empty((), dtype=torch.int32, device=C.device)
    torch.linalg.cholesky_ex(H.mT, out=(H.mT, info))
    return None if int(info) else H.mT
