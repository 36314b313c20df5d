"""How far a trained adapter moves a layer's outputs, and how far it could."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kore.analysis.adapters import Update


@dataclass(frozen=True)
class Retention:
    """Change of a layer's outputs over the data of a covariance, and its bound; norms over all tokens.

    Attributes:
        change: ‖ΔW x‖_F = √tr(ΔW C ΔWᵀ).
        bound: ‖scaling · B‖₂ √tr(A C Aᵀ) ≥ change. The second factor is fixed with A, before any training.
    """

    change: float
    bound: float


def measure_update(update: Update, C: torch.Tensor) -> Retention:
    """How far an update moves the outputs on the data of C = Σ xᵀx, and the bound on that.

    With h = x Aᵀ and ΔB = scaling · B it is ‖h ΔBᵀ‖²_F ≤ ‖ΔB‖₂² ‖h‖²_F, and ‖h‖²_F = tr(A C Aᵀ).

    Args:
        update: ΔW = scaling · B A.
        C: (d_in, d_in). The arithmetic is float64 on its device.
    """
    C = C.double()
    A, B = (factor.detach().to(C.device, torch.float64) for factor in (update.A, update.B))
    hidden = A @ C @ A.mT
    change = float(((B @ hidden) * B).sum())
    bound = float(torch.linalg.matrix_norm(B, 2)) ** 2 * float(hidden.diagonal().sum())
    return Retention(*(abs(update.scaling) * max(energy, 0.0) ** 0.5 for energy in (change, bound)))
