"""symmetrize_ on NVIDIA GPUs: one program reads one tile of the kept triangle and writes its mirror image."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kore_kernels import gpu
from kore_kernels.symmetrize import configs
from kore_kernels.triangle import lower_tile, tiles_of_triangle


def symmetrize(C: Tensor, triangle: str) -> None:
    config = gpu.pick(configs.TRITON, C)
    d = C.shape[0]
    tiles = triton.cdiv(d, config.block)
    # The upper triangle is the lower one of the transposed matrix.
    stride_i, stride_j = (d, 1) if triangle == "lower" else (1, d)
    programs = tiles_of_triangle(tiles)
    gpu.launch(
        _symmetrize, programs, C, C, d, stride_i, stride_j, tiles, BLOCK=config.block, num_warps=config.num_warps
    )


@triton.jit(do_not_specialize=["tiles"])
def _symmetrize(C, d, stride_i, stride_j, tiles, BLOCK: tl.constexpr):
    tile_i, tile_j = lower_tile(tl.program_id(0), tiles)
    i = (tile_i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tile_j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    kept = C + i[:, None] * stride_i + j[None, :] * stride_j
    tile = tl.load(kept, mask=(i[:, None] > j[None, :]) & (i < d)[:, None], other=0.0)
    mirror = C + j[:, None] * stride_i + i[None, :] * stride_j
    tl.store(mirror, tl.trans(tile), mask=(i[None, :] > j[:, None]) & (i < d)[None, :])
