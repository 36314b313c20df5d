"""What the tiles of covariance_update_ allow at best, computed: no GPU needed, and nothing measured.

    python -m benchmarks.covariance_geometry

For the launch that the frozen sm_90 configurations lead to: how much the busiest multiprocessor multiplies, tiles that
reach over the diagonal or the edge included, and how much all of them read and write of C and of the sums of parts.
With the two rates of an H200 these are two times; the update takes at least the longer (they overlap), and about the
sum of both when they do not. The columns are fractions of the symmetric roofline: d² N operations, or one pass over the
triangle. Launches and the L2 cache are left out.
"""

from __future__ import annotations

import torch
import triton

from kore_kernels.covariance_update import configs
from kore_kernels.covariance_update.configs import TritonConfig
from kore_kernels.covariance_update.triton import last_wave
from kore_kernels.gpu import MULTIPROCESSORS
from kore_kernels.triangle import tiles_of_triangle

# Of one H200: a large cuBLAS product in bfloat16, and a copy between two buffers, read and written bytes counted.
RATE, BANDWIDTH = 790e12, 4.3e12


def fractions(d: int, n: int, dtype: torch.dtype, config: TritonConfig, products: int) -> tuple[float, float, float]:
    """(seconds of the roofline, its fraction when work and traffic overlap, when they follow each other)."""
    processors = MULTIPROCESSORS[90]
    x = torch.empty(n, d, dtype=dtype, device="meta")
    tiles = tiles_of_triangle(triton.cdiv(d, config.block_i), config.block_j // config.block_i)
    whole, parts, part_rows = last_wave(tiles, x, config, processors)
    waves, last = divmod(whole, processors)
    rows = waves * n + (last > 0) * n + triton.cdiv((tiles - whole) * parts, processors) * part_rows
    work = 2 * config.block_i * config.block_j * rows * products / (RATE / processors)
    triangle = 4 * d * (d + 1)  # half of it, read and written
    sums = 2 * 4 * (tiles - whole) * parts * config.block_i * config.block_j
    inputs = x.numel() * x.element_size()
    traffic = (triangle + sums + inputs) / BANDWIDTH
    roofline = max(d * (d + 1) * n * products / RATE, (triangle + inputs) / BANDWIDTH)
    return roofline, roofline / max(work, traffic), roofline / (work + traffic)


def main() -> None:
    print(f"{'':>8} {'d':>6} {'N':>5} {'roofline':>9}  {'overlapped':>10} {'in turn':>8}")
    for dtype, config, products in (
        (torch.bfloat16, configs.AS_IS_TMA[90], 1),
        (torch.float32, configs.IN_PIECES[90], 6),
    ):
        for d in (1024, 3584, 4096, 5120, 11008, 13824, 18944):
            for n in (600, 2048, 8192):
                seconds, overlapped, in_turn = fractions(d, n, dtype, config, products)
                name = str(dtype).removeprefix("torch.")
                print(f"{name:>8} {d:>6} {n:>5} {seconds * 1e6:>6.1f} µs  {overlapped:>10.0%} {in_turn:>8.0%}")


if __name__ == "__main__":
    main()
