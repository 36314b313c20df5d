"""Tile sizes of symmetrize_, frozen per architecture family; benchmarks/kernel_audit.py checks each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonConfig:
    """A (block, block) tile of C per program."""

    block: int
    num_warps: int


TRITON: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(32, 4),
    80: TritonConfig(64, 8),
    90: TritonConfig(64, 8),
    100: TritonConfig(64, 8),
}
# Of torch's copies: on CPUs so small that none wakes the threads, which costs more; on GPUs, few launches.
CPU_BLOCK = 128
GPU_BLOCK = 2048
