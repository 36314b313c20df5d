"""lora_fa_linears on NVIDIA GPUs, from the kernels of lora_fa_linear.

h = x U is formed once. In the backward pass the low-rank gradients g_i B_i of all layers meet in one (N, r) matrix
before the one product with Uᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kore_kernels import gpu
from kore_kernels.lora_fa_linear.triton import add_product_, gradients, output, project, two_products
from kore_kernels.padding import pad, pad_columns


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    U: Tensor,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scaling: float,
) -> tuple[list[Tensor], Tensor]:
    h = project(x, pad_columns(U), U.shape[1])
    ys = [output(x, weight, bias, _rotate(h, R), B, scaling) for weight, bias, R, B in zip(weights, biases, Rs, Bs)]
    return ys, h


def backward(
    gs: Sequence[Tensor],
    weights: Sequence[Tensor],
    U: Tensor | None,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    h: Tensor | None,
    scaling: float,
) -> tuple[Tensor | None, list[Tensor]]:
    gBs, dBs = [], []
    for g, R, B in zip(gs, Rs, Bs):
        h_i = None if h is None else _rotate(h, R)
        gB, dB = gradients(g, B, h_i, scaling, want_gB=U is not None)
        gBs.append(gB)
        dBs.append(dB)
    if U is None:
        return None, dBs
    low, Q = project(torch.cat(gBs, dim=1), torch.cat([pad(R) for R in Rs]), U.shape[1]), pad_columns(U).T
    if gpu.library_multiplies(*gs, *weights):
        dx = gs[0] @ weights[0]
        for g, weight in zip(gs[1:], weights[1:]):
            dx.addmm_(g, weight)
        add_product_(dx, low, Q, scaling)
    else:
        dx = two_products(gs[0], weights[0], None, low, Q, scaling)
        for g, weight in zip(gs[1:], weights[1:]):
            dx = two_products(g, weight, add=dx)
    return dx, [] if h is None else dBs


def _rotate(h: Tensor, R: Tensor) -> Tensor:
    """h_i = h R_iᵀ, padded like h."""
    return project(h, pad(R).T, R.shape[0])
