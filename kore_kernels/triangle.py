"""The order in which Triton programs take the tiles of a lower triangle."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_tile(program, tiles):
    """Tile (i, j), i >= j, of a triangle of ``tiles`` rows for program 0 ... tiles * (tiles + 1) / 2 - 1.

    Row r from the bottom and row r from the top together fill one row of a rectangle (with an odd number of rows, the
    bottom row stands alone), so one integer division finds the tile: exact for every size, with no square root.
    """
    odd = tiles & 1
    width = tiles + 1 - odd
    fold = program // width
    column = program - fold * width
    bottom = tiles - fold
    in_bottom = column < bottom
    i = tl.where(in_bottom, bottom - 1, fold - odd)
    j = tl.where(in_bottom, column, column - bottom)
    return i, j
