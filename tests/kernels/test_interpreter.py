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
from kore_kernels.covariance_update.triton import pieces
from kore_kernels.triangle import lower_wide_tile, tiles_of_triangle


@triton.jit
def _tile(I, J, first, strips, WIDE: tl.constexpr, GROUP: tl.constexpr):
    program = tl.program_id(0)
    i, j = lower_wide_tile(first + program, strips, WIDE, GROUP)
    tl.store(I + program, i)
    tl.store(J + program, j)


def decoded(first: int, count: int, strips: int, wide: int, group: int) -> list[tuple[int, int]]:
    i, j = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    _tile[(count,)](i, j, first, strips, WIDE=wide, GROUP=group)
    return list(zip(i.tolist(), j.tolist()))


@pytest.mark.parametrize("strips", [1, 2, 3, 4, 5, 14, 17])
@pytest.mark.parametrize(("wide", "group"), [(1, 1), (1, 4), (2, 3), (4, 8)])
def test_programs_cover_each_tile_of_the_triangle_once(strips, wide, group):
    cells = decoded(0, tiles_of_triangle(strips, wide), strips, wide, group)
    assert sorted(cells) == [(i, j) for i in range(strips) for j in range(i // wide + 1)]


@pytest.mark.parametrize("tiles", [40_000, 40_001])
def test_tile_index_is_exact_where_a_float32_square_root_is_not(tiles):
    cells = decoded(tiles_of_triangle(tiles) - 300, 300, tiles, 1, 8)
    assert len(set(cells)) == 300
    assert all(0 <= j <= i < tiles for i, j in cells)


def test_programs_of_one_wave_read_few_strips():
    """What the bands are for: 132 tiles in a triangle of 89 rows need at least 23 strips of x, row by row 90."""
    for first in range(0, tiles_of_triangle(89) - 132, 1300):
        strips = {strip for cell in decoded(first, 132, 89, 1, 8) for strip in cell}
        assert len(strips) < 45


@triton.jit
def _pieces(HIGH, MIDDLE, LOW, X, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, middle, low = pieces(tl.load(X + at), tl.float32)
    tl.store(HIGH + at, high)
    tl.store(MIDDLE + at, middle)
    tl.store(LOW + at, low)


def split(x: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(3)]
    _pieces[(1,)](*parts, x, BLOCK=len(x))
    return parts


def test_three_pieces_are_bfloat16_and_exact():
    largest = torch.finfo(torch.float32).max
    x = torch.randn(1024) * torch.logspace(-30, 30, 1024)
    x[:6] = torch.tensor([largest, -largest, largest * (1 - 2**-9), 0.0, -0.0, 1e-32])
    parts = split(x)
    assert all(torch.equal(part.bfloat16().float(), part) for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


def test_pieces_of_what_is_not_finite_are_not():
    nan_of_low_bits = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([torch.inf, -torch.inf, torch.nan]), nan_of_low_bits])
    assert not sum(split(x)).isfinite().any()


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
