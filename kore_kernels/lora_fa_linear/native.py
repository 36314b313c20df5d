"""lora_fa_linear on the CPU: the same products as the definition, added in place instead of one pass each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kore_kernels.padding import padded


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    h = project(x.to(A.dtype), A.T)
    y = F.linear(x, weight, bias)
    add_product_(y, h[:, : A.shape[0]], B.T, scaling)
    return y, h


def backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    low = g.to(B.dtype)
    dx = dB = None
    if weight is not None and A is not None:
        dx = g @ weight
        add_product_(dx, low @ B, A, scaling)
    if h is not None:
        dB = (low.T @ h[:, : B.shape[1]]).mul_(scaling)
    return dx, dB


def project(x: Tensor, basis: Tensor) -> Tensor:
    """x @ basis, (N, r), written into (N, padded(r)) whose other columns are zero."""
    r = basis.shape[1]
    h = x.new_empty(x.shape[0], padded(r))
    torch.mm(x, basis, out=h[:, :r])
    h[:, r:] = 0
    return h


def add_product_(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out += scaling * left @ right; the product in its own dtype where that is wider than out's."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, alpha=scaling)
    else:
        out.add_(left @ right, alpha=scaling)
