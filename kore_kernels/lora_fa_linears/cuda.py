"""lora_fa_linears by the compiled kernels for NVIDIA GPUs; what they do not multiply is passed on.

As in the Triton backend, the low-rank gradients of all layers meet in one (N, r) matrix, whose product with Uᵀ rides on
the first layer's input gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kore_kernels import cuda, dispatch
from kore_kernels.cuda import readable, two_products
from kore_kernels.lora_fa_linear.cuda import gradient_of_B, project
from kore_kernels.padding import pad


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    U: Tensor,
    Rs: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scaling: float,
) -> tuple[list[Tensor], Tensor]:
    if not cuda.suits(x, *weights, *biases, U, *Rs, *Bs):
        return dispatch.next_to_native("lora_fa_linears", x.device, x.dtype).forward(
            x, weights, biases, U, Rs, Bs, scaling
        )
    x = readable(x)
    h = project(x, readable(U))
    ys = [
        two_products(x, readable(weight).T, bias, _rotate(h, R), readable(B).T, scaling).contiguous()
        for weight, bias, R, B in zip(weights, biases, Rs, Bs)
    ]
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
    if not cuda.suits(*gs, *weights, U, *Rs, *Bs, h):
        return dispatch.next_to_native("lora_fa_linears", gs[0].device, gs[0].dtype).backward(
            gs, weights, U, Rs, Bs, h, scaling
        )
    gs = [readable(g) for g in gs]
    dBs = [] if h is None else [gradient_of_B(g, _rotate(h, R), R.shape[0], scaling) for g, R in zip(gs, Rs)]
    if U is None:
        return None, dBs
    low = torch.cat([project(g, readable(B)) for g, B in zip(gs, Bs)], dim=1)
    low = project(low, torch.cat([pad(R) for R in Rs])[:, : U.shape[1]])
    dx = two_products(gs[0], readable(weights[0]), None, low, readable(U.T), scaling)
    for g, weight in zip(gs[1:], weights[1:]):
        dx = two_products(g, readable(weight), add=dx)
    return dx.contiguous(), dBs


def _rotate(h: Tensor, R: Tensor) -> Tensor:
    """h_i = h R_iᵀ, padded like h."""
    return project(readable(h), readable(R).T)
