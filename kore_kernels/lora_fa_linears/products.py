"""lora_fa_linears by PyTorch's products: x U once for the group, and one product with Uᵀ for its input gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kore_kernels.lora_fa_linear.products import add_product_, gradient_of_B, padding_pays, project
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
    r = U.shape[1]
    if padding_pays(x):
        U, Rs, Bs = pad_columns(U), [pad(R) for R in Rs], [pad_columns(B) for B in Bs]
    h = project(x, U, r)
    kept = h[:, : U.shape[1]]
    ys = []
    for weight, bias, R, B in zip(weights, biases, Rs, Bs):
        y = F.linear(x, weight, bias)
        add_product_(y, kept @ R.T, B.T, scaling)
        ys.append(y)
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
    r = Bs[0].shape[1]
    if padding_pays(gs[0]):
        U, Rs, Bs = None if U is None else pad_columns(U), [pad(R) for R in Rs], [pad_columns(B) for B in Bs]
    dx: Tensor | None = None
    low: Tensor | None = None
    dBs = []
    for i, (g, R, B) in enumerate(zip(gs, Rs, Bs)):
        wide = g.to(B.dtype)
        if U is not None:
            dx = g @ weights[i] if dx is None else dx.addmm_(g, weights[i])
            gB = wide @ B
            low = gB @ R if low is None else low.addmm_(gB, R)
        if h is not None:
            dBs.append(gradient_of_B(wide, h[:, : R.shape[1]] @ R.T, r, scaling))
    if U is not None and dx is not None and low is not None:
        add_product_(dx, low, U.T, scaling)
    return dx, dBs
