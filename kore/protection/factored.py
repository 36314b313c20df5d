"""A covariance in less memory: its largest components, and the diagonal of what they leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_OVERSAMPLING, _ITERATIONS = 16, 4


@dataclass
class Factored:
    """F Fᵀ + diag(D), in place of a positive semi-definite G (d, d).

    Attributes:
        F: (d, k), in any floating dtype; products are formed in that of D.
        D: (d,), ≥ 0.
    """

    F: torch.Tensor
    D: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.F.nbytes + self.D.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.D.dtype

    @property
    def device(self) -> torch.device:
        return self.D.device

    def to(self, device: torch.device) -> Factored:
        """Itself on another device."""
        return Factored(self.F.to(device), self.D.to(device))

    def __matmul__(self, B: torch.Tensor) -> torch.Tensor:
        """The product with B (d, r): 4 d k r operations."""
        F = self.F.to(self.dtype)
        return torch.addcmul(F @ (F.T @ B), self.D[:, None], B)


@torch.no_grad()
def factored(G: torch.Tensor, components: int, dtype: torch.dtype, storage: torch.dtype, seed: int = 0) -> Factored:
    """The k largest components of G as F Fᵀ, and D = diag(G − F Fᵀ), so that every diagonal entry stays as it is.

    Block subspace iteration with ``components`` + 16 columns gives an orthonormal Q; the Nyström form
    G Q (QᵀGQ)⁻¹ QᵀG, cut to k components, never exceeds G, so D ≥ 0 and F Fᵀ + diag(D) is positive semi-definite,
    also after rounding F. Seeded; exact where k + 16 ≥ d.

    Args:
        G: Positive semi-definite (d, d). The work is done in its dtype.
        components: k ≥ 1; more than d are d.
        dtype: Of D, and of products.
        storage: Of F.
    """
    d, k = len(G), min(components, len(G))
    generator = torch.Generator().manual_seed(seed)
    Q = torch.randn(d, min(d, k + _OVERSAMPLING), generator=generator, dtype=torch.float64).to(G)
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(G @ Q).Q
    Y = G @ Q
    S = Q.T @ Y
    values, vectors = torch.linalg.eigh((S + S.T) / 2)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(G.dtype).eps
    F = Y @ (vectors[:, kept] / values[kept].sqrt())
    F = (F @ torch.linalg.eigh(F.T @ F).eigenvectors[:, -k:]).to(storage)
    D = (G.diagonal() - F.to(G.dtype).square().sum(1)).clamp_min(0)
    return Factored(F.contiguous(), D.to(dtype))
