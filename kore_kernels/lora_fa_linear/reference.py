"""The definition of lora_fa_linear and of its gradients, in plain PyTorch, for any device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kore_kernels.padding import pad_columns


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s h Bᵀ with h = x Aᵀ; returns y and h, the latter padded. x (N, d_in)."""
    h = x.to(A.dtype) @ A.T
    y = F.linear(x, weight, bias) + scaling * (h @ B.T)
    return y.to(x.dtype), pad_columns(h)


def backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g W + s (g B) A, asked for by passing weight and A; dB = s gᵀ h, asked for by passing h. g (N, d_out)."""
    low = g.to(B.dtype)
    dx = dB = None
    if weight is not None and A is not None:
        dx = (g @ weight + scaling * (low @ B @ A)).to(g.dtype)
    if h is not None:
        dB = scaling * (low.T @ h[:, : B.shape[1]])
    return dx, dB
