"""The definition of lora_fa_linears and of its gradients, in plain PyTorch, for any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kore_kernels.padding import pad_columns


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    U: Tensor,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scaling: float,
) -> tuple[list[Tensor], Tensor]:
    """y_i = x W_iᵀ + b_i + s (h R_iᵀ) B_iᵀ with h = x U; returns every y_i and h, the latter padded. x (N, d_in)."""
    h = x.to(U.dtype) @ U
    ys = [
        (F.linear(x, weight, bias) + scaling * (h @ R.T @ B.T)).to(x.dtype)
        for weight, bias, R, B in zip(weights, biases, Rs, Bs)
    ]
    return ys, pad_columns(h)


def backward(
    gs: Sequence[Tensor],
    weights: Sequence[Tensor],
    U: Tensor | None,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    h: Tensor | None,
    scaling: float,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = Σ g_i W_i + s (Σ g_i B_i R_i) Uᵀ, asked for by passing weights and U; dB_i = s g_iᵀ (h R_iᵀ), by h."""
    dx = None
    if U is not None:
        low = torch.stack([g.to(B.dtype) @ B @ R for g, R, B in zip(gs, Rs, Bs)]).sum(0)
        base = torch.stack([g @ weight for g, weight in zip(gs, weights)]).sum(0)
        dx = (base + scaling * (low @ U.T)).to(gs[0].dtype)
    if h is None:
        return dx, []
    kept = h[:, : Rs[0].shape[1]]
    return dx, [scaling * (g.to(B.dtype).T @ (kept @ R.T)) for g, R, B in zip(gs, Rs, Bs)]
