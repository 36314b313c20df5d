"""Tile sizes of covariance_update_, frozen per architecture family; benchmarks/kernel_audit.py checks each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonConfig:
    """A (block, block) tile of C per program, block_n rows of x per step."""

    block: int
    block_n: int
    num_warps: int
    num_stages: int


# Two-byte inputs without weights multiply as they are.
HALF: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(64, 64, 4, 1),
    80: TritonConfig(128, 32, 8, 3),
    90: TritonConfig(128, 64, 8, 4),
    100: TritonConfig(128, 64, 8, 4),
}
# float32 tiles: three TF32 products for one of float32 grade.
SINGLE: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(64, 64, 4, 1),
    80: TritonConfig(64, 16, 4, 3),
    90: TritonConfig(64, 32, 4, 3),
    100: TritonConfig(64, 32, 4, 3),
}
