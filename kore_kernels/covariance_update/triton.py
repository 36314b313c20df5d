"""covariance_update_ on NVIDIA GPUs.

One program owns one tile of the triangle of C: it sums over all rows of x in float32 and adds the result to C in
place. Only tiles that touch the triangle are launched; a tile on the diagonal is masked, so the other half is neither
read nor written.

*The last wave.* Tiles rarely divide evenly among the multiprocessors, and a small d has fewer tiles than those. Tiles
of the last, partial wave are cut along the rows of x until they fill the machine. Each part stores its sum in a small
workspace, and a second kernel adds the parts to C in their order: the same bits in every run, without atomics, and no
program waits for another.

*float32 values*, weighted rows among them, are multiplied as three bfloat16 pieces of 8 bits, which together are
exact. Six products of pieces (three, if the other side is bfloat16) leave out what is below 2^-23 of the result, and
each block of rows is summed by itself, because tensor cores truncate when they accumulate; for the same reason two-byte
rows are added to C after every ``MOST_ROWS``. TF32 in two pieces costs the
tensor cores as much, keeps 22 bits, and cannot read a tile that lies along the wrong axis in shared memory, as x does.

*Loads* go through the tensor memory accelerator where there is one. It cannot leave out the rows that a mask excludes,
which may hold NaN: two-byte x is copied with zeros in their place, any other is fetched by asynchronous copies through
pointers. An x that neither can read in 16-byte pieces is copied too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kore_kernels import dispatch, gpu
from kore_kernels.covariance_update import configs
from kore_kernels.covariance_update.configs import TritonConfig
from kore_kernels.padding import pad_columns
from kore_kernels.triangle import lower_wide_tile, tiles_of_triangle


def covariance_update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    in_pieces = weight is not None or x.dtype == torch.float32
    if mask is not None and not in_pieces and gpu.has_tma(C):
        x, mask = torch.where(mask[:, None], x, x.new_zeros(())), None
    most = len(x) if in_pieces else configs.MOST_ROWS
    for first in range(0, len(x), most):
        rows = slice(first, first + most)
        _update(
            C, x[rows], None if mask is None else mask[rows], None if weight is None else weight[rows], alpha, triangle
        )


def _update(
    C: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, alpha: float | Tensor, triangle: str
) -> None:
    n, d = x.shape
    may_use_tma = mask is None and gpu.has_tma(C)
    tma = may_use_tma and gpu.tma_reads(x)
    if not tma and not gpu.vectors_read(x):
        # A copy in any case: new memory is aligned, which a contiguous x need not be.
        x = pad_columns(x) if d % 16 else x.clone(memory_format=torch.contiguous_format)
        tma = may_use_tma
    in_pieces = weight is not None or x.dtype == torch.float32
    config = gpu.pick(configs.IN_PIECES if in_pieces else configs.AS_IS_TMA if tma else configs.AS_IS, C)
    strips = triton.cdiv(d, config.block_i)
    tiles = tiles_of_triangle(strips, config.block_j // config.block_i)
    whole, parts, part_rows = last_wave(tiles, x, config, gpu.multiprocessors(C))
    cut = tiles - whole
    sums = C.new_empty(cut * parts * config.block_i * config.block_j)
    scale, number = (alpha, 1.0) if isinstance(alpha, Tensor) else (None, alpha)
    common = {
        "UPPER": triangle == "upper",
        "BLOCK_I": config.block_i,
        "BLOCK_J": config.block_j,
        "GROUP": config.group,
    }
    gpu.launch(
        _covariance,
        whole + cut * parts,
        C,
        C,
        sums,
        scale,
        number,
        d,
        strips,
        whole,
        parts,
        x,
        gpu.descriptor(x, config.block_n, config.block_i) if tma else None,
        gpu.descriptor(x, config.block_n, config.block_j) if tma else None,
        None if mask is None else mask.view(torch.uint8),
        weight,
        n,
        x.shape[1],
        x.stride(0),
        0 if mask is None else mask.stride(0),
        0 if weight is None else weight.stride(0),
        part_rows,
        LEFT_IN_PIECES=in_pieces,
        RIGHT_IN_PIECES=in_pieces and x.dtype != torch.bfloat16,
        DOT=tl.bfloat16 if in_pieces and not dispatch.interpreting() else gpu.dot_dtype(x),
        BLOCK_N=config.block_n,
        SLICES=config.slices,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **common,
    )
    slabs = cut * (config.block_i // configs.SLAB)
    gpu.launch(
        _add_parts, slabs, C, C, sums, scale, number, d, strips, whole, parts, SLAB=configs.SLAB, num_warps=4, **common
    )


def last_wave(tiles: int, x: Tensor, config: TritonConfig, processors: int) -> tuple[int, int, int]:
    """(tiles that are summed whole, parts that each of the others is cut into, rows of x in a part).

    As many parts as make the last wave shortest. In rows of x, writing a tile takes about a quarter of ``part_rows``,
    and adding up the parts all of it.
    """
    n, cut = len(x), tiles % processors
    if cut:
        workspace = configs.WORKSPACE + x.numel() * x.element_size()
        most = min(n // config.part_rows, workspace // (4 * config.block_i * config.block_j * cut))

        def length(parts: int) -> float:
            rounds = triton.cdiv(cut * parts, processors)
            return rounds * (n / parts + config.part_rows / 4) + (parts > 1) * config.part_rows

        parts = min(range(1, max(most, 1) + 1), key=length)
        if parts > 1:
            rows = triton.cdiv(triton.cdiv(n, parts), config.block_n) * config.block_n
            return tiles - cut, triton.cdiv(n, rows), rows
    return tiles, 1, 0


@triton.jit(do_not_specialize=["strips", "whole", "parts", "n_rows", "part_rows"])
def _covariance(
    C,
    SUMS,
    ALPHA,
    alpha,
    d,
    strips,
    whole,
    parts,
    X,
    X_I,
    X_J,
    MASK,
    WEIGHT,
    n_rows,
    columns,
    stride_row,
    stride_mask,
    stride_weight,
    part_rows,
    LEFT_IN_PIECES: tl.constexpr,
    RIGHT_IN_PIECES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    part = program - whole
    alone = part < 0
    tile = tl.where(alone, program, whole + part // parts)
    first = tl.where(alone, 0, part % parts * part_rows)
    last = tl.where(alone, n_rows, tl.minimum(first + part_rows, n_rows))
    tile_i, tile_j = lower_wide_tile(tile, strips, BLOCK_J // BLOCK_I, GROUP)
    first_i = tile_i * BLOCK_I
    first_j = tile_j * BLOCK_J
    i = first_i + tl.arange(0, BLOCK_I)
    j = first_j + tl.arange(0, BLOCK_J)
    total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        keep = row < n_rows
        row = row.to(tl.int64)
        if X_I is not None:
            left = tl.trans(X_I.load([start, first_i]))
            right = X_J.load([start, first_j])
        else:
            if MASK is not None:
                keep = keep & (tl.load(MASK + row * stride_mask, mask=keep, other=0) != 0)
            left_kept, right_kept = keep[None, :] & (i < columns)[:, None], keep[:, None] & (j < columns)[None, :]
            left = tl.load(X + row[None, :] * stride_row + i[:, None], mask=left_kept, other=0.0)
            right = tl.load(X + row[:, None] * stride_row + j[None, :], mask=right_kept, other=0.0)
        if LEFT_IN_PIECES:
            left = left.to(tl.float32)
            if WEIGHT is not None:
                left *= tl.load(WEIGHT + row * stride_weight, mask=keep, other=0.0).to(tl.float32)[None, :]
            high, middle, low = pieces(left, DOT)
            if RIGHT_IN_PIECES:
                right_high, right_middle, right_low = pieces(right.to(tl.float32), DOT)
                product = tl.dot(high, right_low)
                product = tl.dot(middle, right_middle, product)
                product = tl.dot(low, right_high, product)
                product = tl.dot(high, right_middle, product)
                product = tl.dot(middle, right_high, product)
                product = tl.dot(high, right_high, product)
            else:
                right = right.to(DOT)
                product = tl.dot(high, right, tl.dot(middle, right, tl.dot(low, right)))
            total += product
        else:
            total = tl.dot(left.to(DOT), right.to(DOT), total)
    if ALPHA is not None:
        alpha = tl.load(ALPHA).to(tl.float32)
    total *= tl.where(alone, alpha, 1.0)
    # A part's sum lies in the workspace as it would in C, so that one piece of code writes both: where its tile starts
    # there, and how far apart its rows are.
    pitch = BLOCK_I if UPPER else BLOCK_J
    SUMS += part * (BLOCK_I * BLOCK_J) - cell(first_i, first_j, pitch, UPPER)
    pitch = tl.where(alone, d, pitch)
    # In slices: a whole tile of C beside the sums does not fit in the registers.
    if SLICES == 1:
        _write(C, SUMS, alone, total, first_i, first_j, d, pitch, UPPER)
    else:
        left, right = _halves(total)
        width: tl.constexpr = BLOCK_J // SLICES
        if SLICES == 2:
            _write(C, SUMS, alone, left, first_i, first_j, d, pitch, UPPER)
            _write(C, SUMS, alone, right, first_i, first_j + width, d, pitch, UPPER)
        else:
            one, two = _halves(left)
            three, four = _halves(right)
            _write(C, SUMS, alone, one, first_i, first_j, d, pitch, UPPER)
            _write(C, SUMS, alone, two, first_i, first_j + width, d, pitch, UPPER)
            _write(C, SUMS, alone, three, first_i, first_j + 2 * width, d, pitch, UPPER)
            _write(C, SUMS, alone, four, first_i, first_j + 3 * width, d, pitch, UPPER)


@triton.jit
def _write(C, SUMS, alone, tile, first_i, first_j, d, pitch, UPPER: tl.constexpr):
    """Add what of ``tile`` lies in the triangle to C, or store it among the sums."""
    i = first_i + tl.arange(0, tile.shape[0])[:, None]
    j = first_j + tl.arange(0, tile.shape[1])[None, :]
    inside = (i >= j) & (i < d)
    to_add = inside & (i < tl.where(alone, d, 0))
    at = cell(i, j, pitch, UPPER)
    at = tl.where(alone, C + at, SUMS + at)
    tl.store(at, tl.load(at, mask=to_add, other=0.0) + tile, mask=inside)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def cell(i, j, pitch, UPPER: tl.constexpr):
    """Where (i, j) of the lower triangle lies in a matrix with rows ``pitch`` apart; in the upper one, it is (j, i)."""
    if UPPER:
        i, j = j, i
    return tl.cast(i, tl.int64) * pitch + j


@triton.jit
def pieces(x, DOT: tl.constexpr):
    """x = high + middle + low, each bfloat16. Exact from 1e-32 on; finite where x is: a rounded high could overflow."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    middle = (x - high).to(tl.bfloat16)
    low = x - high - middle.to(tl.float32)
    return high.to(DOT), middle.to(DOT), low.to(DOT)


@triton.jit(do_not_specialize=["strips", "whole", "parts"])
def _add_parts(
    C,
    SUMS,
    ALPHA,
    alpha,
    d,
    strips,
    whole,
    parts,
    SLAB: tl.constexpr,
    UPPER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    GROUP: tl.constexpr,
):
    """C += alpha * (part 0 + part 1 + ...) for ``SLAB`` rows of one of the tiles that were cut."""
    tile = tl.program_id(0) // (BLOCK_I // SLAB)
    tile_i, tile_j = lower_wide_tile(whole + tile, strips, BLOCK_J // BLOCK_I, GROUP)
    inner_i = (tl.program_id(0) % (BLOCK_I // SLAB) * SLAB + tl.arange(0, SLAB))[:, None]
    inner_j = tl.arange(0, BLOCK_J)[None, :]
    i = tile_i * BLOCK_I + inner_i
    j = tile_j * BLOCK_J + inner_j
    inside = (i >= j) & (i < d)
    sums = SUMS + tile * parts * (BLOCK_I * BLOCK_J) + cell(inner_i, inner_j, BLOCK_I if UPPER else BLOCK_J, UPPER)
    total = tl.zeros((SLAB, BLOCK_J), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(sums + part * (BLOCK_I * BLOCK_J), mask=inside, other=0.0)
    if ALPHA is not None:
        alpha = tl.load(ALPHA).to(tl.float32)
    at = C + cell(i, j, d, UPPER)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + alpha * total, mask=inside)
