"""The definition of symmetrize_, in plain PyTorch, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetrize(C: Tensor) -> None:
    """C[i, j] = C[j, i] for i < j."""
    lower = torch.ones_like(C, dtype=torch.bool).tril()
    C.copy_(torch.where(lower, C, C.T))
