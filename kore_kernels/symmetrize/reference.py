"""The definition of symmetrize_, in plain PyTorch, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetrize(C: Tensor, triangle: str) -> None:
    """C[i, j] = C[j, i] for i < j (lower) or i > j (upper)."""
    everywhere = torch.ones_like(C, dtype=torch.bool)
    kept = everywhere.tril() if triangle == "lower" else everywhere.triu()
    C.copy_(torch.where(kept, C, C.T))
