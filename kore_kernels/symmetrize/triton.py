"""symmetrize_ on NVIDIA GPUs: one program reads one tile of the kept triangle and writes its mirror image."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kore_kernels import gpu
from kore_kernels.symmetrize import configs
from kore_kernels.triangle import lower_tile


def symmetrize(C: Tensor, triangle: str = "lower") -> None:
    config = gpu.pick(configs.TRITON, C)
    d = C.shape[0]
    tiles = triton.cdiv(d, config.block)
    programs = tiles * (tiles + 1) // 2
    upper = triangle == "upper"
    gpu.launch(_symmetrize, programs, C, C, d, tiles, UPPER=upper, BLOCK=config.block, num_warps=config.num_warps)


@triton.jit(do_not_specialize=["tiles"])
def _symmetrize(C, d, tiles, UPPER: tl.constexpr, BLOCK: tl.constexpr):
    tile_i, tile_j = lower_tile(tl.program_id(0), tiles)
    i = (tile_i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tile_j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    below = C + i[:, None] * d + j[None, :]
    above = C + j[:, None] * d + i[None, :]
    is_below = (i[:, None] > j[None, :]) & (i < d)[:, None]
    is_above = (i[None, :] > j[:, None]) & (i < d)[None, :]
    if UPPER:
        tl.store(below, tl.trans(tl.load(above, mask=is_above, other=0.0)), mask=is_below)
    else:
        tl.store(above, tl.trans(tl.load(below, mask=is_below, other=0.0)), mask=is_above)
