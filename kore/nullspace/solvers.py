"""Solvers for the smallest eigenvectors of a symmetric positive semi-definite float64 matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def solve_eigh(C: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (d, r) and the r smallest eigenvalues, from the full eigendecomposition of C."""
    eigenvalues, vectors = torch.linalg.eigh(C)
    return vectors[:, :rank].clone(), eigenvalues[:rank].clone()


@dataclass(frozen=True)
class Randomized:
    basis: torch.Tensor
    converged: bool
    iterations: int


def solve_randomized(
    C: torch.Tensor, rank: int, seed: int, tolerance: float, max_iterations: int, oversampling: int | None = None
) -> Randomized:
    """U (d, r) by block subspace iteration with (C + σI)⁻¹, a random start of r + p columns, and Rayleigh–Ritz.

    Every iteration solves with a Cholesky factor of the equilibrated shifted matrix, orthonormalises by QR, and
    takes Ritz vectors of C itself, so neither the shift nor the scaling biases the result. With Ritz values
    θ_1 ≤ … ≤ θ_{r+p} and residuals ρ_i = ‖C u_i − θ_i u_i‖, the excess Σ(θ_i − λ_i) over the r smallest
    eigenvalues is at most about Σ ρ_i² / (θ_{r+p} − θ_i) (Kato–Temple, θ_{r+p} standing for the first eigenvalue
    outside the block); the iteration stops when that is below ``tolerance`` Σ θ_i, or when the whole block has no
    energy above the rounding of C, ε tr(C) a direction.
    """
    d = C.shape[0]
    extra = max(64, rank // 4) if oversampling is None else oversampling
    columns = min(d, rank + extra)
    trace = float(C.diagonal().sum())
    eye = torch.eye(d, columns, dtype=C.dtype, device=C.device)
    if trace <= 0:
        return Randomized(eye[:, :rank].clone(), True, 0)
    solve = _ShiftedInverse(C, trace / d)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(d, columns, dtype=torch.float64, generator=generator).to(C.device)
    Q = torch.linalg.qr(start).Q
    noise = torch.finfo(C.dtype).eps * trace
    U, converged, iteration = Q[:, :rank], False, 0
    for iteration in range(1, max_iterations + 1):  # noqa: B007
        Q = torch.linalg.qr(solve(Q)).Q
        product = C @ Q
        theta, rotation = torch.linalg.eigh(Q.mT @ product)
        Q, product = Q @ rotation, product @ rotation
        U, ritz = Q[:, :rank], theta[:rank]
        squared = (product[:, :rank] - U * ritz).square().sum(dim=0)
        gap = (theta[-1] - ritz).clamp_min(torch.finfo(C.dtype).tiny)
        excess, energy = float((squared / gap).sum()), max(float(ritz.abs().sum()), rank * noise)
        converged = columns == d or float(theta[-1]) <= 4 * noise or excess <= tolerance * energy
        if converged:
            break
    return Randomized(U.clone(), converged, iteration)


class _ShiftedInverse:
    """X ↦ (C + σI)⁻¹ X through a Cholesky factor of D^-½ (C + σI) D^-½, D the diagonal of C + σI.

    The shift starts at ε times the mean eigenvalue and grows until the factorisation succeeds, which for a
    rank-deficient C takes a few tries.
    """

    def __init__(self, C: torch.Tensor, mean: float) -> None:
        shift = torch.finfo(C.dtype).eps * mean
        diagonal = C.diagonal()
        while True:
            self._scale = (diagonal + shift).clamp_min(shift).rsqrt()
            H = C * self._scale[:, None] * self._scale
            H.diagonal().copy_((diagonal + shift) * self._scale.square())
            self._factor, info = torch.linalg.cholesky_ex(H)
            if int(info) == 0:
                break
            shift *= 100

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        Y = torch.cholesky_solve(X * self._scale[:, None], self._factor) * self._scale[:, None]
        return Y / torch.linalg.vector_norm(Y, dim=0)
