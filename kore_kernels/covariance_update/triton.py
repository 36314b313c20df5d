"""covariance_update_ on NVIDIA GPUs.

One program owns one tile of the triangle of C: it sums over all rows of x in float32 registers and adds the
result to C in place, so nothing is allocated and the sum is the same in every run. Only tiles of the triangle are
launched; a tile on the diagonal is masked, so the other half is neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kore_kernels import gpu
from kore_kernels.covariance_update import configs
from kore_kernels.triangle import lower_tile


def covariance_update(
    C: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    alpha: float | Tensor,
    triangle: str = "lower",
) -> None:
    n, d = x.shape
    # A weighted two-byte row no longer fits in two bytes: it is multiplied as float32.
    dot_dtype = tl.float32 if weight is not None else gpu.dot_dtype(x)
    config = gpu.pick(configs.SINGLE if dot_dtype == tl.float32 else configs.HALF, C)
    tiles = triton.cdiv(d, config.block)
    on_device = isinstance(alpha, Tensor)
    gpu.launch(
        _covariance,
        tiles * (tiles + 1) // 2,
        C,
        C,
        x,
        None if mask is None else mask.view(torch.uint8),
        weight,
        alpha if on_device else None,
        1.0 if on_device else alpha,
        n,
        d,
        x.stride(0),
        x.stride(1),
        0 if mask is None else mask.stride(0),
        0 if weight is None else weight.stride(0),
        tiles,
        UPPER=triangle == "upper",
        DOT=dot_dtype,
        BLOCK=config.block,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit(do_not_specialize=["n_rows", "tiles"])
def _covariance(
    C,
    X,
    MASK,
    WEIGHT,
    ALPHA,
    alpha,
    n_rows,
    d,
    stride_row,
    stride_column,
    stride_mask,
    stride_weight,
    tiles,
    UPPER: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile_i, tile_j = lower_tile(tl.program_id(0), tiles)
    if UPPER:
        tile_i, tile_j = tile_j, tile_i
    i = tile_i * BLOCK + tl.arange(0, BLOCK)
    j = tile_j * BLOCK + tl.arange(0, BLOCK)
    x_i = X + i.to(tl.int64)[None, :] * stride_column
    x_j = X + j.to(tl.int64)[None, :] * stride_column
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        keep = row < n_rows
        row = row.to(tl.int64)
        if MASK is not None:
            keep = keep & (tl.load(MASK + row * stride_mask, mask=keep, other=0) != 0)
        left = tl.load(x_i + row[:, None] * stride_row, mask=keep[:, None] & (i < d)[None, :], other=0.0).to(DOT)
        right = tl.load(x_j + row[:, None] * stride_row, mask=keep[:, None] & (j < d)[None, :], other=0.0).to(DOT)
        if WEIGHT is not None:
            w = tl.load(WEIGHT + row * stride_weight, mask=keep, other=0.0)
            left = left * w.to(tl.float32)[:, None]
        total = tl.dot(tl.trans(left), right, total, input_precision="tf32x3")
    if ALPHA is not None:
        alpha = tl.load(ALPHA).to(tl.float32)
    if UPPER:
        half = (i[:, None] <= j[None, :]) & (j < d)[None, :]
    else:
        half = (i[:, None] >= j[None, :]) & (i < d)[:, None]
    cells = C + i.to(tl.int64)[:, None] * d + j[None, :]
    tl.store(cells, tl.load(cells, mask=half, other=0.0) + alpha * total, mask=half)
