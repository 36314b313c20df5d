"""Ranks such as 235 or 274 stored as 240 or 288 columns: rows start aligned, and tiles need no column mask."""

from __future__ import annotations

from torch import Tensor


def padded(rank: int) -> int:
    """The next multiple of 16."""
    return (rank + 15) // 16 * 16


def pad_columns(matrix: Tensor) -> Tensor:
    """(n, r) contiguous with zero columns up to a multiple of 16; itself if that is what it is."""
    n, r = matrix.shape
    return _zeros_around(matrix, n, padded(r)) if r % 16 else matrix.contiguous()


def pad_rows(matrix: Tensor) -> Tensor:
    """(r, n) with zero rows up to a multiple of 16; itself if it has such a number."""
    r, n = matrix.shape
    return _zeros_around(matrix, padded(r), n) if r % 16 else matrix


def pad(square: Tensor) -> Tensor:
    """(r, r) contiguous with zero rows and columns up to a multiple of 16."""
    r = square.shape[0]
    return _zeros_around(square, padded(r), padded(r)) if r % 16 else square.contiguous()


def _zeros_around(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Written once, where ``F.pad`` fills the whole with zeros first."""
    n, r = matrix.shape
    out = matrix.new_empty(rows, columns)
    out[:n, :r] = matrix
    out[n:] = 0
    out[:n, r:] = 0
    return out
