"""lora_fa_linear on NVIDIA GPUs.

*Two-byte layers* are multiplied by cuBLAS, whose loop is far ahead of Triton's: on an H100 the fused forward pass of
4096 to 4096 features, 8192 tokens and rank 256, took 0.51 ms where cuBLAS's frozen product takes 0.34. The low-rank
product is added to the result in place: by cuBLAS too if the factors have x's dtype, else, and under dropout, by
``_two_products`` without its first product.

*float32 layers* go through ``_two_products``, which computes out = L R + bias + s P Q in one pass over the output: the
forward product (x Wᵀ + b + s h Bᵀ), the input gradient (g W + s gB A) and, without P and Q, h = x Aᵀ and the merged
weight s B A + W. Three TF32 products make one of float32 grade. The low-rank product comes first, so that one
accumulator serves both.

*Dropout*: the tiles of x, or the sums of gB A before anything is added to them, lose what the mask drops; the mask of a
tile is computed where it is needed.

``_gradients`` computes gB = g B and dB = gᵀ h for float32 factors. Both in one register-resident pass over g would need
partial results larger than g itself (one of the two is always summed across programs), so the rows of g are taken in
chunks that fit the L2 cache: the programs of a chunk first form its rows of gB, then its share of dB, and g crosses the
memory bus once. The shares of dB are added in a fixed order; nothing is atomic, and every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kore_kernels import dispatch, gpu
from kore_kernels.lora_fa_linear import configs, dropout, products
from kore_kernels.padding import pad_columns, pad_rows, padded


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h = project(x, A.T, A.shape[0], dropout_p, seed)
    return output(x, weight, bias, h, B, scaling), h


def backward(
    g: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    gB, dB = gradients(g, B, h, scaling, want_gB=weight is not None)
    if weight is None or A is None or gB is None:
        return None, dB
    if gpu.library_multiplies(g, weight):
        dx = g @ weight
        add_product_(dx, gB, A, scaling, dropout_p, seed)
        return dx, dB
    return two_products(g, weight, None, gB, A, scaling, dropout_p=dropout_p, seed=seed), dB


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    y = F.linear(x, merged(weight, A, B, scaling), bias)
    return y, project(x, A.T, A.shape[0]) if want_h else None


def merged_backward(
    g: Tensor, weight: Tensor | None, A: Tensor | None, B: Tensor, h: Tensor | None, scaling: float
) -> tuple[Tensor | None, Tensor | None]:
    dB = None if h is None else gradients(g, B, h, scaling, want_gB=False)[1]
    return None if weight is None or A is None else g @ merged(weight, A, B, scaling), dB


def merged(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s B A in W's dtype."""
    if gpu.library_multiplies(weight, A, B):
        return products.merged(weight, A, B, scaling)
    return two_products(pad_columns(B), A, scaling=scaling, add=weight)


def output(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y = x Wᵀ + b + scaling h Bᵀ."""
    Q = pad_columns(B).T
    if gpu.library_multiplies(x, weight):
        y = F.linear(x, weight, bias)
        add_product_(y, h, Q, scaling)
        return y
    return two_products(x, weight.T, bias, h, Q, scaling)


def project(x: Tensor, basis: Tensor, rank: int, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(x) @ basis[:, :rank] in basis's dtype as (N, padded(rank)) whose other columns are zero."""
    if seed is None and gpu.library_multiplies(x, basis):
        return products.project(x, basis, rank)
    h = x.new_empty(x.shape[0], padded(rank), dtype=basis.dtype)
    _launch_two_products(configs.DROPPED, h, x, basis[:, :rank], dropout_p=dropout_p, seed=seed)
    return h


def two_products(
    L: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    P: Tensor | None = None,
    Q: Tensor | None = None,
    scaling: float = 1.0,
    *,
    add: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """L R + bias + scaling drop(P Q) + add, each term but the first if given; without P and Q, scaling is L R's.

    In the dtype of ``add``, or else of L. L may have more columns than R has rows, and P than Q, if those columns are
    zero.
    """
    out = (L if add is None else add).new_empty(L.shape[0], R.shape[1])
    _launch_two_products(configs.ADDED, out, L, R, bias, P, Q, scaling, add, dropout_p, seed)
    return out


def add_product_(
    out: Tensor, P: Tensor, Q: Tensor, scaling: float, dropout_p: float = 0.0, seed: Tensor | None = None
) -> None:
    """out += scaling drop(P Q), in place; P may have more columns than Q has rows, if those columns are zero."""
    if seed is None and gpu.library_multiplies(out, P, Q):
        out.addmm_(P, pad_rows(Q), alpha=scaling)
    else:
        _launch_two_products(configs.ADDED, out, None, None, None, P, Q, scaling, out, dropout_p, seed)


def _launch_two_products(
    half: Mapping[int | str, configs.TritonConfig],
    out: Tensor,
    L: Tensor | None,
    R: Tensor | None,
    bias: Tensor | None = None,
    P: Tensor | None = None,
    Q: Tensor | None = None,
    scaling: float = 1.0,
    add: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    m, n = out.shape
    base_dot = None if L is None or R is None else gpu.dot_dtype(L, R)
    low_rank_dot = None if P is None or Q is None else gpu.dot_dtype(P, Q)
    config = gpu.pick(configs.SINGLE if tl.float32 in (base_dot, low_rank_dot) else half, out)
    right = Q if R is None else R
    assert right is not None
    gpu.launch(
        _two_products,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        out,
        out,
        L,
        R,
        None if bias is None else bias.contiguous(),
        P,
        Q,
        add,
        seed,
        float(scaling) / (1 - dropout_p),
        dropout.threshold(dropout_p),
        m,
        n,
        right.shape[1],
        0 if L is None else L.shape[1],
        0 if R is None else R.shape[0],
        0 if P is None else P.shape[1],
        0 if Q is None else Q.shape[0],
        out.stride(0),
        *_strides(L),
        *_strides(R),
        _strides(P)[0],
        *_strides(Q),
        *_strides(add),
        BASE_DOT=base_dot,
        LOW_RANK_DOT=low_rank_dot,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=configs.GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


@triton.jit(do_not_specialize=["m", "threshold"])
def _two_products(
    OUT,
    L,
    R,
    BIAS,
    P,
    Q,
    ADD,
    SEED,
    scaling,
    threshold,
    m,
    n,
    r_columns,
    l_columns,
    r_rows,
    p_columns,
    q_rows,
    stride_out,
    stride_lm,
    stride_lk,
    stride_rk,
    stride_rn,
    stride_p,
    stride_qk,
    stride_qn,
    stride_am,
    stride_an,
    BASE_DOT: tl.constexpr,
    LOW_RANK_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows, columns = _tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    in_m, in_n = rows < m, columns < r_columns
    row, column = rows.to(tl.int64), columns.to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if P is not None:
        p = P + row[:, None] * stride_p
        q = Q + column[None, :] * stride_qn
        for start in range(0, p_columns, BLOCK_K):
            at = start + inner
            left = tl.load(p + at[None, :], mask=in_m[:, None] & (at < p_columns)[None, :], other=0.0)
            right = tl.load(q + at[:, None] * stride_qk, mask=(at < q_rows)[:, None] & in_n[None, :], other=0.0)
            total = tl.dot(left.to(LOW_RANK_DOT), right.to(LOW_RANK_DOT), total, input_precision="tf32x3")
        if SEED is not None:
            kept = _keep(SEED, rows, columns, threshold, BLOCK_M, BLOCK_N)
            total = tl.where(kept, total, 0.0)
        total *= scaling
    if L is not None:
        l = L + row[:, None] * stride_lm
        r = R + column[None, :] * stride_rn
        for start in range(0, l_columns, BLOCK_K):
            at = start + inner
            far = at.to(tl.int64)
            left = tl.load(l + far[None, :] * stride_lk, mask=in_m[:, None] & (at < l_columns)[None, :], other=0.0)
            right = tl.load(r + far[:, None] * stride_rk, mask=(at < r_rows)[:, None] & in_n[None, :], other=0.0)
            if P is None and SEED is not None:
                left = tl.where(_keep(SEED, rows, at, threshold, BLOCK_M, BLOCK_K), left, 0.0)
            total = tl.dot(left.to(BASE_DOT), right.to(BASE_DOT), total, input_precision="tf32x3")
    if P is None:
        total *= scaling
    if BIAS is not None:
        total += tl.load(BIAS + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    inside = in_m[:, None] & (columns < n)[None, :]
    if ADD is not None:
        added = ADD + row[:, None] * stride_am + column[None, :] * stride_an
        total += tl.load(added, mask=inside, other=0.0).to(tl.float32)
    # Columns beyond R's are padding: zero, even in a row that is not finite.
    total = tl.where(in_n[None, :], total, 0.0)
    tl.store(OUT + row[:, None] * stride_out + columns[None, :], total.to(OUT.dtype.element_ty), mask=inside)


def gradients(
    g: Tensor, B: Tensor, h: Tensor | None, scaling: float, *, want_gB: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(gB = g B with padded columns if wanted, dB = scaling gᵀ h if h is given), both in B's dtype."""
    (m, n), r = g.shape, B.shape[1]
    if gpu.library_multiplies(g, B):
        gB = g @ pad_columns(B) if want_gB else None
        return gB, None if h is None else products.gradient_of_B(g, h, r, scaling)
    config = gpu.pick(configs.SINGLE, g)
    chunk_rows = configs.INTERPRETER_CHUNK_ROWS if dispatch.interpreting() else configs.CHUNK_ROWS
    chunks = triton.cdiv(m, chunk_rows)
    rank_tiles = triton.cdiv(padded(r), config.block_n)
    gB_programs = chunk_rows // config.block_m * rank_tiles if want_gB else 0
    dB_programs = triton.cdiv(n, config.block_m) * rank_tiles if h is not None else 0
    gB = g.new_empty(m, padded(r), dtype=B.dtype) if want_gB else None
    shares = None if h is None else g.new_empty(chunks, n, padded(r), dtype=torch.float32)
    gpu.launch(
        _gradients,
        chunks * (gB_programs + dB_programs),
        g,
        g,
        pad_columns(B),
        None if h is None else h.contiguous(),
        gB,
        shares,
        m,
        n,
        r,
        padded(r),
        chunk_rows,
        gB_programs,
        dB_programs,
        *g.stride(),
        DOT=gpu.dot_dtype(g, B),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return gB, None if shares is None else (shares.sum(0)[:, :r] * scaling).to(B.dtype)


@triton.jit(do_not_specialize=["m", "gB_programs", "dB_programs"])
def _gradients(
    G,
    B,
    H,
    GB,
    SHARES,
    m,
    n,
    r,
    r_padded,
    chunk_rows,
    gB_programs,
    dB_programs,
    stride_gm,
    stride_gn,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    in_chunk = gB_programs + dB_programs
    chunk = tl.program_id(0) // in_chunk
    local = tl.program_id(0) - chunk * in_chunk
    first, last = chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, m)
    if GB is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if local < gB_programs:
            _gB_tile(G, B, GB, local, first, last, n, r, r_padded, stride_gm, stride_gn, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
    if SHARES is not None:  # noqa: SIM102
        if local >= gB_programs:
            share = SHARES + chunk.to(tl.int64) * n * r_padded
            local -= gB_programs
            _dB_tile(G, H, share, local, first, last, n, r_padded, stride_gm, stride_gn, DOT, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def _gB_tile(
    G,
    B,
    GB,
    tile,
    first,
    last,
    n,
    r,
    r_padded,
    stride_gm,
    stride_gn,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of gB: rows of the chunk by columns of the rank, summed over the columns of g."""
    rank_tiles = tl.cdiv(r_padded, BLOCK_N)
    columns = tile % rank_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first + tile // rank_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rank, in_rows = (columns < r_padded)[None, :], (rows < last)[:, None]
    row = rows.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, n, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        far, inside = at.to(tl.int64), at < n
        left = tl.load(G + row * stride_gm + far[None, :] * stride_gn, mask=in_rows & inside[None, :], other=0.0)
        right = tl.load(B + far[:, None] * r_padded + columns[None, :], mask=inside[:, None] & in_rank, other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="tf32x3")
    # Padding columns are zero, even in a row that is not finite.
    total = tl.where((columns < r)[None, :], total, 0.0)
    tl.store(GB + row * r_padded + columns[None, :], total.to(GB.dtype.element_ty), mask=in_rows & in_rank)


@triton.jit
def _dB_tile(
    G,
    H,
    SHARE,
    tile,
    first,
    last,
    n,
    r_padded,
    stride_gm,
    stride_gn,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the chunk's share of dB: columns of g by columns of the rank, summed over the rows of the chunk."""
    rank_tiles = tl.cdiv(r_padded, BLOCK_N)
    columns = tile % rank_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tile // rank_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rank, in_rows = (columns < r_padded)[None, :], rows < n
    row = rows.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        far, inside = at.to(tl.int64), at < last
        gT = G + row[:, None] * stride_gn + far[None, :] * stride_gm
        left = tl.load(gT, mask=in_rows[:, None] & inside[None, :], other=0.0)
        right = tl.load(H + far[:, None] * r_padded + columns[None, :], mask=inside[:, None] & in_rank, other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="tf32x3")
    tl.store(SHARE + row[:, None] * r_padded + columns[None, :], total, mask=in_rows[:, None] & in_rank)


@triton.jit
def _keep(SEED, rows, columns, threshold, M: tl.constexpr, N: tl.constexpr):
    """The dropout mask (M, N) of these rows and of columns that begin at a multiple of four."""
    quads = tl.min(columns, 0) // 4 + tl.arange(0, N // 4)
    zero = tl.zeros((M, N // 4), dtype=tl.int32)
    a, b, c, d = tl.philox(tl.load(SEED), quads[None, :] + zero, rows[:, None] + zero, zero, zero)
    a, b, c, d = _bit(a, threshold), _bit(b, threshold), _bit(c, threshold), _bit(d, threshold)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(M, N) != 0


@triton.jit
def _bit(word, threshold):
    return ((word >> 1).to(tl.int32) >= threshold).to(tl.int8)


@triton.jit
def _tile(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of a program's tile: GROUP tiles downwards before one to the right."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    in_group = GROUP * tiles_n
    top = program // in_group * GROUP
    height = tl.minimum(tiles_m - top, GROUP)
    local = program % in_group
    rows = (top + local % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = local // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, columns
