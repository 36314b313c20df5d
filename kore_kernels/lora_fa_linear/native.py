"""lora_fa_linear on the CPU: the same products as the definition, added in place instead of one pass each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kore_kernels import extension
from kore_kernels.lora_fa_linear import dropout
from kore_kernels.padding import padded


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
    h = project(x.to(A.dtype), A.T) if seed is None else _project_dropped(x, A.T, dropout_p, seed)
    y = F.linear(x, weight, bias)
    add_product_(y, h[:, : A.shape[0]], B.T, scaling)
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
    low = g.to(B.dtype)
    dx = None
    if weight is not None and A is not None:
        dx = g @ weight
        if seed is None:
            add_product_(dx, low @ B, A, scaling)
        else:
            _add_dropped_product_(dx, low @ B, A, scaling, dropout_p, seed)
    return dx, None if h is None else _gradient_of_B(low, B, h, scaling)


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    y = F.linear(x, merged(weight, A, B, scaling), bias)
    return y, project(x.to(A.dtype), A.T) if want_h else None


def merged_backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    dx = None if weight is None or A is None else g @ merged(weight, A, B, scaling)
    return dx, None if h is None else _gradient_of_B(g.to(B.dtype), B, h, scaling)


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s B A in W's dtype, rounded once."""
    if weight.dtype == B.dtype:
        return torch.addmm(weight, B, A, alpha=scaling)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        out[rows] = weight[rows].to(B.dtype).addmm_(B[rows], A, alpha=scaling)
    return out


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


# Rows of a temporary that is not made whole.
_ROWS = 512


def _gradient_of_B(g: Tensor, B: Tensor, h: Tensor, scaling: float) -> Tensor:
    return (g.T @ h[:, : B.shape[1]]).mul_(scaling)


def _project_dropped(x: Tensor, basis: Tensor, p: float, seed: Tensor) -> Tensor:
    """drop(x) @ basis, written as ``project`` writes it."""
    r = basis.shape[1]
    h = basis.new_zeros(x.shape[0], padded(r))
    for first in range(0, len(x), _ROWS):
        rows = slice(first, first + _ROWS)
        kept = _drop(x[rows], p, seed, first).to(basis.dtype)
        h[rows, :r].addmm_(kept, basis, beta=0, alpha=1 / (1 - p))
    return h


def _add_dropped_product_(out: Tensor, left: Tensor, right: Tensor, scaling: float, p: float, seed: Tensor) -> None:
    """out += scaling * drop(left @ right)."""
    for first in range(0, len(out), _ROWS):
        rows = slice(first, first + _ROWS)
        product = left[rows] @ right
        out[rows].add_(_drop(product, p, seed, first, out=product), alpha=scaling / (1 - p))


def _drop(x: Tensor, p: float, seed: Tensor, first: int, out: Tensor | None = None) -> Tensor:
    """``dropout.drop`` by the compiled code where it is there; ``out`` is contiguous, and may be x."""
    if extension.refusal() is not None:
        return dropout.drop(x, p, seed, first)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    extension.dropout(x, int(seed), dropout.threshold(p), first, out, extension.isa())
    return out
