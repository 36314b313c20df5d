"""symmetrize_ by PyTorch's copies, block by block, on any device. Nothing of C's size is made."""

from __future__ import annotations

import torch
from torch import Tensor

from kore_kernels.symmetrize.configs import CPU_BLOCK, GPU_BLOCK


def symmetrize(C: Tensor, triangle: str) -> None:
    C = C if triangle == "lower" else C.T
    d, block = C.shape[0], CPU_BLOCK if C.is_cpu else GPU_BLOCK
    for low in range(0, d, block):
        high = min(low + block, d)
        for left in range(0, low, block):
            C[left : left + block, low:high].copy_(C[low:high, left : left + block].T)
        diagonal = C[low:high, low:high]
        lower = torch.ones_like(diagonal, dtype=torch.bool).tril()
        diagonal.copy_(torch.where(lower, diagonal, diagonal.T))
