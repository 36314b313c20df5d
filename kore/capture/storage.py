"""Where the matrices of a capture live: one by one, in pairs that share memory, or on the host."""

from __future__ import annotations

import torch

from kore.triangle import Triangle

STORAGE = ("auto", "packed", "square", "offload")


class Storage:
    """Hands out zeroed triangles.

    Two (d, d) triangles fill one contiguous buffer (d + 1, d): one lies in the lower triangle of ``buffer[1:]``, the
    other in the upper triangle of ``buffer[:d]``. The first matrix of a size takes the one, the next the other.

    Args:
        kind: ``"packed"`` keeps such pairs on the device of the rows that they sum, ``"offload"`` keeps them on the
            host (page-locked where the rows come from a GPU), ``"square"`` gives each matrix d² entries.
        dtype: Of the matrices.
    """

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        self._free: dict[tuple[int, torch.device], torch.Tensor] = {}

    def place(self, dim: int, device: torch.device) -> Triangle:
        """A triangle for a matrix (dim, dim) that sums rows on ``device``."""
        if self.kind == "square":
            return Triangle(torch.zeros(dim, dim, dtype=self.dtype, device=device))
        half = self._free.pop((dim, device), None)
        if half is not None:
            return Triangle(half[:dim], "upper")
        host = self.kind == "offload"
        buffer = torch.zeros(
            dim + 1,
            dim,
            dtype=self.dtype,
            device="cpu" if host else device,
            pin_memory=host and device.type == "cuda",
        )
        self._free[dim, device] = buffer
        return Triangle(buffer[1:], "lower")
