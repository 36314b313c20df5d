"""covariance_update_ without kernels of our own: syrk on C's own memory, or torch products block by block.

Rows that need work first (a mask, weights, a dtype other than C's, strides that BLAS cannot read) are gathered, scaled
and converted in chunks, so the extra memory is one chunk whatever d and N are. GPUs multiply in C's dtype too, and the
host does not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kore_kernels import blas

BLOCK = 256  # edge of the blocks of the triangle
CHUNK_ELEMENTS = 2**21  # of converted rows ...
LEAST_ROWS = 512  # ... but enough rows to pay for one pass over C
GPU_BLOCK = 2048
GPU_CHUNK_ELEMENTS = 2**24


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    if C.is_cpu:
        _update_on_cpu(C, x, mask, weight, float(alpha), triangle)
    else:
        _update_on_gpu(C, x, mask, weight, alpha, triangle)


def _update_on_gpu(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    """Rows that the mask leaves out become zeros: to gather the rest, the host would have to wait for their number."""
    size = max(LEAST_ROWS, GPU_CHUNK_ELEMENTS // C.shape[0])
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = x[part].to(C.dtype)
        weighted = alpha * (rows if weight is None else rows * weight[part].to(C.dtype)[:, None])
        if mask is not None:
            rows, weighted = (torch.where(mask[part, None], each, 0.0) for each in (rows, weighted))
        _add_product(C, weighted, rows, 1.0, triangle, GPU_BLOCK)


def _update_on_cpu(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float, triangle: str
) -> None:
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is None and weight is None and x.dtype == C.dtype and (blas.can_syrk(C, x) or not blas.available()):
        _add_gram(C, x, alpha, triangle)
        return
    for sign, index in _signed_rows(mask, weight):
        for start, rows in _chunks(x, index, max(LEAST_ROWS, CHUNK_ELEMENTS // C.shape[0])):
            chunk = rows.to(C.dtype)
            if weight is not None:
                picked = slice(start, start + len(rows)) if index is None else index[start : start + len(rows)]
                chunk = chunk * weight[picked].to(C.dtype).abs().sqrt().unsqueeze(1)
            _add_gram(C, chunk.contiguous(), sign * alpha, triangle)


def _signed_rows(mask: Tensor | None, weight: Tensor | None) -> Iterator[tuple[float, Tensor | None]]:
    """(sign, indices, None meaning all) of the kept rows; a group for each sign of the weights, as syrk needs √|w|."""
    negative = None if weight is None else weight < 0
    if negative is None or not bool(negative.any()):
        yield 1.0, None if mask is None else mask.nonzero().squeeze(1)
        return
    for sign, group in ((1.0, ~negative), (-1.0, negative)):
        yield sign, (group if mask is None else group & mask).nonzero().squeeze(1)


def _chunks(x: Tensor, index: Tensor | None, size: int) -> Iterator[tuple[int, Tensor]]:
    count = len(x) if index is None else len(index)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield start, x[start:stop] if index is None else x[index[start:stop]]


def _add_gram(C: Tensor, x: Tensor, alpha: float, triangle: str) -> None:
    """One triangle of C += alpha * xᵀx. BLAS skips the product at alpha = 0, and with it a NaN: torch does not."""
    if alpha != 0.0 and blas.can_syrk(C, x):
        blas.syrk(C, x, alpha, triangle)
    else:
        _add_product(C, x, x, alpha, triangle, BLOCK)


def _add_product(C: Tensor, left: Tensor, right: Tensor, alpha: float, triangle: str, block: int) -> None:
    """One triangle of C += alpha * leftᵀ right, a symmetric product."""
    C = C if triangle == "lower" else C.T
    d = C.shape[0]
    for low in range(0, d, block):
        high = min(low + block, d)
        panel = left[:, low:high].T
        if low:
            C[low:high, :low].add_(panel @ right[:, :low], alpha=alpha)
        diagonal = C[low:high, low:high]
        lower = torch.ones_like(diagonal, dtype=torch.bool).tril()
        diagonal.copy_(torch.where(lower, diagonal + alpha * (panel @ right[:, low:high]), diagonal))
