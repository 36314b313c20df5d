"""Ranks such as 235 or 274 stored as 240 or 288 columns: rows start aligned, and tiles need no column mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def padded(rank: int) -> int:
    """The next multiple of 16."""
    return (rank + 15) // 16 * 16


def pad_columns(matrix: Tensor) -> Tensor:
    """(n, r) contiguous with zero columns up to a multiple of 16; itself if that is what it is."""
    r = matrix.shape[1]
    return F.pad(matrix, (0, padded(r) - r)).contiguous()


def pad_rows(matrix: Tensor) -> Tensor:
    """(r, n) with zero rows up to a multiple of 16; itself if it has such a number."""
    r = matrix.shape[0]
    return F.pad(matrix, (0, 0, 0, padded(r) - r)) if r % 16 else matrix


def pad(square: Tensor) -> Tensor:
    """(r, r) with zero rows and columns up to a multiple of 16."""
    extra = padded(square.shape[0]) - square.shape[0]
    return F.pad(square, (0, extra, 0, extra)).contiguous()
