"""Checks of the Triton code itself that need its interpreter; ``test_triton.py`` starts the run they belong to."""

from __future__ import annotations

import pytest
import torch

from .conftest import INTERPRETER

if not INTERPRETER:
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from kore_kernels import gpu
from kore_kernels.triangle import lower_tile


@triton.jit
def _tiles(I, J, first, tiles, BLOCK: tl.constexpr):
    program = first + tl.arange(0, BLOCK)
    i, j = lower_tile(program, tiles)
    tl.store(I + tl.arange(0, BLOCK), i)
    tl.store(J + tl.arange(0, BLOCK), j)


def decoded(first: int, count: int, tiles: int) -> list[tuple[int, int]]:
    block = triton.next_power_of_2(count)
    i, j = torch.zeros(block, dtype=torch.int32), torch.zeros(block, dtype=torch.int32)
    _tiles[(1,)](i, j, first, tiles, BLOCK=block)
    return list(zip(i[:count].tolist(), j[:count].tolist()))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 17, 64, 89])
def test_programs_cover_each_tile_of_the_triangle_once(tiles):
    cells = decoded(0, tiles * (tiles + 1) // 2, tiles)
    assert sorted(cells) == [(i, j) for i in range(tiles) for j in range(i + 1)]


@pytest.mark.parametrize("tiles", [40_000, 40_001])
def test_tile_index_is_exact_where_a_float32_square_root_is_not(tiles):
    count = tiles * (tiles + 1) // 2
    cells = decoded(count - 4096, 4096, tiles)
    assert len(set(cells)) == 4096
    assert all(0 <= j <= i < tiles for i, j in cells)


@triton.jit
def _product(OUT, A, B, CAST: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(A + at), tl.load(B + at)
    if CAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(OUT + at, tl.dot(a, b, input_precision="ieee"))


def test_canary_bfloat16_products_need_the_cast():
    """The interpreter multiplies the bit patterns of bfloat16 as integers: why ``gpu.dot_dtype`` says float32 there."""
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    exact = a.double() @ b.double()
    as_is, cast = torch.zeros(16, 16), torch.zeros(16, 16)
    _product[(1,)](as_is, a, b, CAST=False)
    _product[(1,)](cast, a, b, CAST=True)
    torch.testing.assert_close(cast.double(), exact, atol=1e-5, rtol=1e-5)
    assert gpu.dot_dtype(a, b) == tl.float32
    if torch.allclose(as_is.double(), exact, atol=1e-2):
        pytest.skip("this Triton's interpreter multiplies bfloat16 correctly; the cast is no longer needed for it")
