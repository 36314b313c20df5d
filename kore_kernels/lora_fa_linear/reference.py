"""The definition of lora_fa_linear and of its gradients, in plain PyTorch, for any device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kore_kernels.lora_fa_linear import dropout
from kore_kernels.padding import pad_columns


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s h Bᵀ with h = drop(x) Aᵀ; returns y and h, the latter padded. x (N, d_in).

    drop(x) is x without a seed, else (keep ⊙ x) / (1 − p); the factor is taken into the product with Aᵀ.
    """
    if seed is None:
        h = x.to(A.dtype) @ A.T
    else:
        h = (dropout.drop(x, dropout_p, seed).to(A.dtype) @ A.T) / (1 - dropout_p)
    y = F.linear(x, weight, bias) + scaling * (h @ B.T)
    return y.to(x.dtype), pad_columns(h)


def backward(
    g: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g W + s drop(g B A), asked for by passing weight and A; dB = s gᵀ h, asked for by h. g (N, d_out)."""
    low = g.to(B.dtype)
    dx = dB = None
    if weight is not None and A is not None:
        through_A = low @ B @ A
        if seed is not None:
            through_A = dropout.drop(through_A, dropout_p, seed) / (1 - dropout_p)
        dx = (g @ weight + scaling * through_A).to(g.dtype)
    if h is not None:
        dB = scaling * (low.T @ h[:, : B.shape[1]])
    return dx, dB


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    """y = x W'ᵀ + b with W' = W + s B A, rounded once to W's dtype; and h = x Aᵀ, padded, if wanted. x (N, d_in)."""
    y = F.linear(x, merged(weight, A, B, scaling), bias)
    return y, pad_columns(x.to(A.dtype) @ A.T) if want_h else None


def merged_backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g W', asked for by passing weight and A; dB = s gᵀ h, asked for by passing h. g (N, d_out)."""
    dx = None if weight is None or A is None else g @ merged(weight, A, B, scaling)
    return dx, None if h is None else scaling * (g.to(B.dtype).T @ h[:, : B.shape[1]])


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W' = W + s B A in W's dtype, formed in the wider of the two dtypes."""
    return (weight + scaling * (B @ A)).to(weight.dtype)
