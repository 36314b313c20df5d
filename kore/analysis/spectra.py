"""How the energy of a layer's inputs is spread over directions."""

from __future__ import annotations

import torch


def spectrum(C: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (d,) of a symmetric (d, d) matrix in float64, descending."""
    return torch.linalg.eigvalsh(C.detach().to(torch.float64)).flip(0)


def effective_rank(eigenvalues: torch.Tensor) -> float:
    """(Σλ)² / Σλ², the number of directions that a flat spectrum of the same spread would have; 0 for C = 0."""
    square = float(eigenvalues.square().sum())
    return float(eigenvalues.sum()) ** 2 / square if square > 0 else 0.0
