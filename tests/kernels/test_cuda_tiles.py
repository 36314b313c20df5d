"""csrc/cuda/tiles.h on the CPU: every tile and every step of every sum is taken exactly once."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "tiles.h"
SOURCE = """
#include "%s"
using namespace kore;
extern "C" void triangle(int tiles, int group, int* out) {
    for (int i = 0; i < tiles * (tiles + 1) / 2; ++i) {
        const Tile tile = tile_of_triangle(i, tiles, group);
        out[2 * i] = tile.row;
        out[2 * i + 1] = tile.column;
    }
}
extern "C" void rectangle(int rows, int columns, int group, int* out) {
    for (int i = 0; i < rows * columns; ++i) {
        const Tile tile = tile_of_rectangle(i, rows, columns, group);
        out[2 * i] = tile.row;
        out[2 * i + 1] = tile.column;
    }
}
extern "C" int pieces(int squares, int upper, int* out) {
    int count = 0;
    for (int i = 0; i < pieces_of_triangle(squares); ++i)
        for (int rank = 0; rank < 2; ++rank) {
            const Piece piece = piece_of_triangle(i, rank, squares, upper, 4);
            const bool corners = piece.kind == Piece::CORNERS;
            for (int cell = 0; cell < 2; ++cell) {
                out[count++] = corners ? cell ? piece.other : piece.column : piece.row;
                out[count++] = corners ? cell ? piece.other : piece.column : piece.column + cell;
            }
        }
    return count / 2;
}
extern "C" int items(int tiles, int blocks, int clusters, int* out) {
    const Schedule schedule = cut_last_wave(tiles, blocks, clusters);
    for (int i = 0; i < schedule.items(); ++i) {
        out[4 * i] = schedule.tile(i);
        out[4 * i + 1] = schedule.first_block(i);
        out[4 * i + 2] = schedule.count(i);
        out[4 * i + 3] = schedule.is_part(i);
    }
    return schedule.items();
}
"""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "tiles.cpp").write_text(SOURCE % HEADER)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, folder / "tiles.cpp", "-o", folder / "tiles.so"], check=True)
    return ctypes.CDLL(str(folder / "tiles.so"))


def pairs(function, count: int, *arguments: int) -> list[tuple[int, int]]:
    out = (ctypes.c_int * (2 * count))()
    function(*arguments, out)
    return list(zip(out[::2], out[1::2], strict=True))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 43])
def test_a_triangle_is_covered_once(tiles, size, group):
    found = pairs(tiles.triangle, size * (size + 1) // 2, size, group)
    assert sorted(found) == [(i, j) for i in range(size) for j in range(i + 1)]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("squares", [1, 2, 3, 4, 5, 16, 43])
def test_pieces_cover_the_cells_of_a_triangle_once(tiles, squares, upper):
    out = (ctypes.c_int * (8 * squares * (squares + 7)))()
    count = tiles.pieces(squares, int(upper), out)
    cells = [(out[2 * i], out[2 * i + 1]) for i in range(count)]
    inside = [(i, j) for i, j in cells if max(i, j) < 2 * squares]
    triangle = [(i, j) for i in range(2 * squares) for j in range(i + 1)]
    assert sorted((j, i) if upper else (i, j) for i, j in inside) == triangle


@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 1, 8), (5, 3, 2), (32, 16, 8), (33, 43, 8)])
def test_a_rectangle_is_covered_once(tiles, rows, columns, group):
    found = pairs(tiles.rectangle, rows * columns, rows, columns, group)
    assert sorted(found) == [(i, j) for i in range(rows) for j in range(columns)]


@pytest.mark.parametrize("clusters", [1, 4, 66])
@pytest.mark.parametrize("blocks", [1, 2, 7, 32, 33, 512])
@pytest.mark.parametrize("count", [1, 10, 66, 136, 946])
def test_every_sum_is_complete(tiles, count, blocks, clusters):
    out = (ctypes.c_int * (4 * count * max(blocks, 1)))()
    items = tiles.items(count, blocks, clusters, out)
    rows = [tuple(out[4 * i : 4 * i + 4]) for i in range(items)]
    steps = [(tile, first + step) for tile, first, steps, _ in rows for step in range(steps)]
    assert sorted(steps) == [(tile, block) for tile in range(count) for block in range(blocks)]
    assert all(steps > 0 for _, _, steps, _ in rows)
    whole = sum(not is_part for *_, is_part in rows)
    assert whole == count or whole % clusters == 0
    assert items - whole <= max(clusters, count % clusters)
