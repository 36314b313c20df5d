"""csrc/cuda/ampere_layout.h on the CPU: a stage of the pipeline, copied, loaded and multiplied as the GPU would."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "ampere_layout.h"
SOURCE = """
#include "%s"
#include <cstring>
using namespace kore::ampere;

static int16_t shared[2][FACTOR_BYTES / 2];

// factor: (TILE, BLOCK), the summed dimension last.
static void copy(bool own, const int16_t* factor, int16_t* to) {
    for (int thread = 0; thread < THREADS; ++thread)
        for (int i = 0; i < PIECES; ++i) {
            const Place place = copied(own, thread, i);
            for (int e = 0; e < PIECE; ++e)
                to[place.offset / 2 + e] = factor[(place.own + (own ? e : 0)) * BLOCK + place.step + (own ? 0 : e)];
        }
}

// What ldmatrix gives each lane, from the rows that the lanes name.
template <class Row>
static void load(bool transposed, const int16_t* from, int16_t (&to)[32][4][2], Row row) {
    for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int e = 0; e < 2; ++e) {
                const int g = lane / 4, t = lane %% 4 * 2 + e;
                const int i = transposed ? t : g, j = transposed ? g : t;
                to[lane][matrix][e] = from[row(8 * matrix + i) / 2 + j];
            }
}

extern "C" void stage(int left_own, int right_own, const int16_t* left, const int16_t* right, int32_t* out) {
    copy(left_own, left, shared[0]);
    copy(right_own, right, shared[1]);
    for (int warp = 0; warp < WARPS; ++warp)
        for (int step = 0; step < BLOCK; step += 16)
            for (int m = 0; m < SUMS_DOWN; ++m)
                for (int n = 0; n < SUMS_RIGHT; ++n) {
                    int16_t a[32][4][2], b[32][4][2];
                    const int first = 32 * warp;
                    load(left_own, shared[0], a, [&](int l) { return left_row(left_own, first + l, m, step); });
                    load(right_own, shared[1], b, [&](int l) { return right_row(right_own, first + l, n / 2, step); });
                    int L[16][16], R[16][8];  // what mma.m16n8k16 makes of the registers
                    for (int lane = 0; lane < 32; ++lane)
                        for (int q = 0; q < 4; ++q)
                            for (int e = 0; e < 2; ++e) {
                                const int k = lane %% 4 * 2 + e;
                                L[lane / 4 + q %% 2 * 8][k + q / 2 * 8] = a[lane][q][e];
                                if (q < 2) R[k + q * 8][lane / 4] = b[lane][n %% 2 * 2 + q][e];
                            }
                    for (int lane = 0; lane < 32; ++lane)
                        for (int h = 0; h < 2; ++h)
                            for (int e = 0; e < 2; ++e) {
                                int sum = 0;
                                for (int k = 0; k < 16; ++k) sum += L[lane / 4 + 8 * h][k] * R[k][lane %% 4 * 2 + e];
                                const int i = row_of_sum(first + lane) + 16 * m + 8 * h;
                                const int j = column_of_sum(first + lane) + 8 * n + e;
                                out[i * TILE + j] += sum;
                            }
                }
}
extern "C" int copy_offset(int own, int thread, int i) { return copied(own, thread, i).offset; }
extern "C" int left_offset(int own, int thread, int m, int step) { return left_row(own, thread, m, step); }
extern "C" int right_offset(int own, int thread, int n, int step) { return right_row(own, thread, n, step); }
extern "C" int piece_bytes(int64_t first, int64_t count) { return bytes_of_piece(first, count); }
extern "C" void sizes(int* out) {
    const int values[] = {TILE, BLOCK, THREADS, PIECES, SUMS_DOWN, SUMS_RIGHT, FACTOR_BYTES, SHARED_BYTES};
    std::memcpy(out, values, sizeof values);
}
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("ampere")
    (folder / "ampere.cpp").write_text(SOURCE % HEADER)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, folder / "ampere.cpp", "-o", folder / "ampere.so"], check=True)
    return ctypes.CDLL(str(folder / "ampere.so"))


@pytest.fixture(scope="module")
def sizes(layout) -> dict[str, int]:
    out = (ctypes.c_int * 8)()
    layout.sizes(out)
    names = ("tile", "block", "threads", "pieces", "sums_down", "sums_right", "factor_bytes", "shared_bytes")
    return dict(zip(names, out, strict=True))


@pytest.mark.parametrize("left_own", [False, True])
@pytest.mark.parametrize("right_own", [False, True])
def test_a_stage_multiplies(layout, sizes, left_own, right_own):
    left, right = (torch.randint(-100, 100, (sizes["tile"], sizes["block"]), dtype=torch.int16) for _ in range(2))
    out = torch.zeros(sizes["tile"], sizes["tile"], dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (left, right, out)]
    layout.stage(int(left_own), int(right_own), *pointers)
    assert torch.equal(out, left.int() @ right.int().T)


@pytest.mark.parametrize("own", [False, True])
def test_copies_fill_a_stage_without_bank_conflicts(layout, sizes, own):
    places = [
        [layout.copy_offset(int(own), thread, i) for thread in range(sizes["threads"])] for i in range(sizes["pieces"])
    ]
    assert sorted(place for row in places for place in row) == list(range(0, sizes["factor_bytes"], 16))
    for row in places:
        for first in range(0, sizes["threads"], 8):
            assert len({place // 16 % 8 for place in row[first : first + 8]}) == 8


@pytest.mark.parametrize("own", [False, True])
def test_loads_meet_no_bank_twice(layout, sizes, own):
    for offset, count in ((layout.left_offset, sizes["sums_down"]), (layout.right_offset, sizes["sums_right"] // 2)):
        for i in range(count):
            for step in range(0, sizes["block"], 16):
                rows = [offset(int(own), thread, i, step) for thread in range(sizes["threads"])]
                for first in range(0, len(rows), 8):
                    assert len({row // 16 % 8 for row in rows[first : first + 8]}) == 8


def test_sizes(layout, sizes):
    assert sizes["shared_bytes"] <= 48 * 1024  # needs no permission, and two blocks fit into 100 KiB
    layout.piece_bytes.argtypes = [ctypes.c_int64] * 2
    assert [layout.piece_bytes(8, count) for count in (7, 8, 9, 15, 16, 99)] == [0, 0, 2, 14, 16, 16]
