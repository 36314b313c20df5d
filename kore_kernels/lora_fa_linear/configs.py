"""Tile sizes of the LoRA linears, frozen per architecture family; benchmarks/kernel_audit.py checks each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonConfig:
    """A (block_m, block_n) tile of the result per program, block_k of the summed dimension per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# The low-rank product added to a two-byte y or dx; the mask of a tile needs as many registers as its sums.
ADDED: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(64, 64, 64, 4, 1),
    80: TritonConfig(128, 128, 32, 8, 3),
    90: TritonConfig(128, 128, 64, 8, 4),
    100: TritonConfig(128, 128, 64, 8, 4),
}
# h of a two-byte x under dropout, only as wide as the rank.
DROPPED: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(64, 64, 64, 4, 1),
    80: TritonConfig(128, 64, 32, 8, 3),
    90: TritonConfig(128, 128, 64, 8, 3),
    100: TritonConfig(128, 128, 64, 8, 3),
}
# Products of float32 tiles: three TF32 products for one of float32 grade.
SINGLE: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(64, 64, 64, 4, 1),
    80: TritonConfig(64, 64, 16, 8, 3),
    90: TritonConfig(64, 64, 32, 4, 3),
    100: TritonConfig(64, 64, 32, 8, 3),
}

# Programs that are neighbours in time share this many rows of tiles, and so the second factor in the L2 cache.
GROUP = 8
# Rows of the incoming gradient that are read for gB and then, from the L2 cache, for dB.
CHUNK_ROWS = 1024
INTERPRETER_CHUNK_ROWS = 64
