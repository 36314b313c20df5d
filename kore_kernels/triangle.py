"""The order in which Triton programs take the tiles of a lower triangle."""

from __future__ import annotations

import triton
import triton.language as tl


def tiles_of_triangle(strips: int, wide: int = 1) -> int:
    """How many tiles, ``wide`` times as wide as high, touch the lower triangle of ``strips`` rows of tiles."""
    squares, rest = divmod(strips, wide)
    return squares * (squares + 1) // 2 * wide + rest * (squares + 1)


@triton.jit
def lower_tile(program, tiles, GROUP: tl.constexpr = 1):
    """Tile (i, j), i >= j, of a triangle of ``tiles`` rows for program 0 ... tiles * (tiles + 1) / 2 - 1.

    Row r from the bottom and row r from the top together fill one row of a rectangle (with an odd number of rows, the
    bottom row stands alone), so integer divisions find the tile: exact for every size, with no square root. The
    rectangle is taken in bands of ``GROUP`` rows, down each column of a band: programs that run at the same time then
    read few rows and few columns of tiles, which the L2 cache keeps.
    """
    odd = tiles & 1
    width = tiles + 1 - odd
    band = program // (GROUP * width)
    inside = program - band * GROUP * width
    rows = tl.minimum((tiles + 1) // 2 - band * GROUP, GROUP)
    column = inside // rows
    fold = band * GROUP + inside - column * rows
    bottom = tiles - fold
    in_bottom = column < bottom
    i = tl.where(in_bottom, bottom - 1, fold - odd)
    j = tl.where(in_bottom, column, column - bottom)
    return i, j


@triton.jit
def lower_wide_tile(program, strips, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """The same for tiles ``WIDE`` times as wide as high: program 0 ... tiles_of_triangle(strips, WIDE) - 1.

    Squares of ``WIDE`` tiles form a triangle; the strips left over at the bottom follow, row by row.
    """
    squares = strips // WIDE
    rest = program - squares * (squares + 1) // 2 * WIDE
    if rest < 0:
        i, j = lower_tile(program // WIDE, squares, GROUP)
        i = i * WIDE + program % WIDE
    else:
        i = squares * WIDE + rest // (squares + 1)
        j = rest % (squares + 1)
    return i, j
