"""The definition of covariance_update_, in plain PyTorch, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    """C[i, j] += alpha * Σ_n w_n x[n, i] x[n, j] for i >= j (lower) or i <= j (upper); x (N, d), mask and weight (N,).

    Excluded rows are replaced by zeros, not multiplied by them, so that what they hold (NaN, inf) does not matter.
    """
    rows = x.to(C.dtype)
    weighted = rows if weight is None else rows * weight.to(C.dtype).unsqueeze(1)
    if mask is not None:
        rows = torch.where(mask.unsqueeze(1), rows, 0.0)
        weighted = torch.where(mask.unsqueeze(1), weighted, 0.0)
    everywhere = torch.ones_like(C, dtype=torch.bool)
    half = everywhere.tril() if triangle == "lower" else everywhere.triu()
    C.copy_(torch.where(half, C + alpha * (weighted.T @ rows), C))
