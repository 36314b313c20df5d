"""symmetrize_ on the CPU: the compiled kernel, or torch copies block by block. Nothing of C's size is made."""

from __future__ import annotations

import torch
from torch import Tensor

from kore_kernels import extension
from kore_kernels.symmetrize.configs import NATIVE_BLOCK


def symmetrize(C: Tensor, triangle: str) -> None:
    if extension.refusal() is None:
        extension.symmetrize(C, triangle)
    else:
        _copy_blocks(C if triangle == "lower" else C.T)


def _copy_blocks(C: Tensor) -> None:
    d = C.shape[0]
    for low in range(0, d, NATIVE_BLOCK):
        high = min(low + NATIVE_BLOCK, d)
        for left in range(0, low, NATIVE_BLOCK):
            C[left : left + NATIVE_BLOCK, low:high].copy_(C[low:high, left : left + NATIVE_BLOCK].T)
        diagonal = C[low:high, low:high]
        lower = torch.ones_like(diagonal, dtype=torch.bool).tril()
        diagonal.copy_(torch.where(lower, diagonal, diagonal.T))
