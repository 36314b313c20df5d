"""Tile sizes of covariance_update_ in Triton, frozen per architecture family.

``benchmarks/kernel_audit.py`` checks each; ``benchmarks/tune_covariance.py`` times candidates on a GPU and rewrites the
three tables.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonConfig:
    """A (block_i, block_j) tile of C per program, ``block_n`` rows of x per step.

    block_j is a multiple of block_i, and that of ``SLAB``. ``slices`` (1, 2 or 4): in how many pieces, side by side, a
    finished tile is added to C. ``group``: how many rows of tiles are taken together. ``part_rows``: the fewest rows of
    x that are worth a program of their own.
    """

    block_i: int
    block_j: int
    block_n: int
    num_warps: int
    num_stages: int
    slices: int
    group: int = 8
    part_rows: int = 512


# Two-byte inputs without weights multiply as they are. Fetched by the tensor memory accelerator:
AS_IS_TMA: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(32, 64, 32, 4, 1, 4, group=2, part_rows=64),
    90: TritonConfig(128, 256, 64, 8, 4, 4),
    100: TritonConfig(128, 256, 64, 8, 4, 4),
}
# Fetched through pointers:
AS_IS: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(32, 32, 32, 4, 1, 1, group=2, part_rows=64),
    80: TritonConfig(128, 128, 32, 8, 4, 4),
    90: TritonConfig(128, 128, 64, 8, 3, 4),
    100: TritonConfig(128, 128, 64, 8, 3, 2),
}
# float32 and weighted inputs multiply as bfloat16 pieces. On sm_100 some Tritons give each of the six products its own
# accumulator in tensor memory, which holds six of 64 columns, not of 128.
IN_PIECES: dict[int | str, TritonConfig] = {
    "interpreter": TritonConfig(32, 64, 32, 4, 1, 2, group=2, part_rows=64),
    80: TritonConfig(64, 128, 16, 8, 3, 2),
    90: TritonConfig(64, 128, 32, 4, 3, 2),
    100: TritonConfig(64, 64, 32, 4, 3, 1),
}

# Bytes that the sums of parts may take, beside as many as x has.
WORKSPACE = 8 * 2**20
# Two-byte rows that tensor cores add up without a float32 addition in between. Measured on an H100 (normal random x,
# relative error of C): 7e-7 after 600 rows, 3.5e-6 after 2048, 2.1e-5 after 8192, by cuBLAS as by these kernels.
MOST_ROWS = 4096
# Rows of a tile that one program adds the parts of.
SLAB = 16
