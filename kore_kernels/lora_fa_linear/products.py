"""lora_fa_linear by PyTorch's products, on any device: those of the definition, added in place, not one pass each.

A rank such as 235 is padded for the products, which take less time so. Under dropout, and where A and B are wider than
x, the low-rank products go by blocks of rows: neither a dropped copy of x nor a product of y's size is made whole. The
native backend on CPUs is this file; compiled code draws the mask there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kore_kernels import extension
from kore_kernels.lora_fa_linear import dropout
from kore_kernels.padding import pad_columns, pad_rows, padded

# Rows of what is made in parts because it is not needed whole.
_ROWS = 512
_ROWS_WORTH_A_COPY = 128


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
    r = A.shape[0]
    if padding_pays(x):
        A, B = pad_rows(A), pad_columns(B)
    h = project(x, A.T, r, dropout_p, seed)
    y = F.linear(x, weight, bias)
    add_product_(y, h[:, : B.shape[1]], B.T, scaling)
    return y, h


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
    low, r = g.to(B.dtype), B.shape[1]
    dx = None
    if weight is not None and A is not None:
        if padding_pays(g):
            A, B = pad_rows(A), pad_columns(B)
        dx = g @ weight
        add_product_(dx, low @ B, A, scaling, dropout_p, seed)
    return dx, None if h is None else gradient_of_B(low, h, r, scaling)


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    y = F.linear(x, merged(weight, A, B, scaling), bias)
    return y, project(x, A.T, A.shape[0]) if want_h else None


def merged_backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    dx = None if weight is None or A is None else g @ merged(weight, A, B, scaling)
    return dx, None if h is None else gradient_of_B(g.to(B.dtype), h, B.shape[1], scaling)


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s B A in W's dtype, rounded once."""
    if weight.dtype == B.dtype:
        return torch.addmm(weight, B, A, alpha=scaling)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows, _ in _parts(weight):
        out[rows] = weight[rows].to(B.dtype).addmm_(B[rows], A, alpha=scaling)
    return out


def padding_pays(x: Tensor) -> bool:
    """Whether a product of x is faster, by more than the copy costs, with factors whose rank is a multiple of 16."""
    return len(x) >= _ROWS_WORTH_A_COPY


def project(x: Tensor, basis: Tensor, rank: int, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(x) @ basis, written into (N, padded(rank)) whose other columns are zero; basis (d, rank), padded or not."""
    h = basis.new_empty(x.shape[0], padded(rank))
    filled = h[:, : basis.shape[1]]
    h[:, basis.shape[1] :] = 0
    if seed is None and x.dtype == basis.dtype:
        torch.mm(x, basis, out=filled)
        return h
    for rows, first in _parts(x):
        part = x[rows] if seed is None else _drop(x[rows], dropout_p, seed, first)
        filled[rows].addmm_(part.to(basis.dtype), basis, beta=0, alpha=1 / (1 - dropout_p))
    return h


def add_product_(
    out: Tensor, left: Tensor, right: Tensor, scaling: float, dropout_p: float = 0.0, seed: Tensor | None = None
) -> None:
    """out += scaling * drop(left @ right); the product in its own dtype where that is wider than out's."""
    if seed is None and left.dtype == out.dtype:
        out.addmm_(left, right, alpha=scaling)
        return
    for rows, first in _parts(out):
        product = left[rows] @ right
        if seed is not None:
            product = _drop(product, dropout_p, seed, first, out=product)
        out[rows].add_(product, alpha=scaling / (1 - dropout_p))


def gradient_of_B(g: Tensor, h: Tensor, rank: int, scaling: float) -> Tensor:
    """scaling * gᵀ h without h's padding."""
    dB = h.new_empty(g.shape[1], h.shape[1])
    return dB.addmm_(g.T, h, beta=0, alpha=scaling)[:, :rank].contiguous()


def _parts(tensor: Tensor) -> Iterator[tuple[slice, int]]:
    for first in range(0, len(tensor), _ROWS):
        yield slice(first, first + _ROWS), first


def _drop(x: Tensor, p: float, seed: Tensor, first: int, out: Tensor | None = None) -> Tensor:
    """``dropout.drop``, on CPUs by the compiled code if it is there; ``out`` is contiguous, and may be x."""
    if not x.is_cpu or extension.refusal() is not None:
        return dropout.drop(x, p, seed, first)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    extension.dropout(x, int(seed), dropout.threshold(p), first, out, extension.isa())
    return out
