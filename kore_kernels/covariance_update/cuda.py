"""covariance_update_ by the compiled kernels for NVIDIA GPUs: two-byte x without weights, into a float32 C.

Anything else is passed on. An x with a mask is copied, zeros in place of the rows that it excludes, which may hold NaN;
so is one whose rows the kernels cannot read in pieces of 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kore_kernels import cuda, dispatch
from kore_kernels.covariance_update.configs import MOST_ROWS


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    if weight is not None or C.dtype != torch.float32 or not cuda.suits(x):
        backend = dispatch.next_to_native("covariance_update", C.device, C.dtype)
        backend.covariance_update(C, x, mask, weight, alpha, triangle)
        return
    if mask is not None:
        x = torch.where(mask[:, None], x, x.new_zeros(()))
    for rows in cuda.readable(x).split(MOST_ROWS):
        cuda.covariance_update(C, rows, alpha, triangle)
