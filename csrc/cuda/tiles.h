// Which tile of the result, and which part of its sum, a cluster works on. Plain C++, for the host and the GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KORE_HOST_DEVICE inline
#endif

namespace kore {

struct Tile {
    int row, column;
};

KORE_HOST_DEVICE int ceil_div(int64_t a, int b) { return int((a + b - 1) / b); }

KORE_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Tile `index` of rows x columns: `group` tiles downwards before one to the right, so that what runs at the same time
// reads few rows and few columns of tiles, which the L2 cache keeps.
KORE_HOST_DEVICE Tile tile_of_rectangle(int index, int rows, int columns, int group) {
    const int in_band = group * columns, top = index / in_band * group;
    const int height = smaller(rows - top, group), local = index % in_band;
    return {top + local % height, local / height};
}

// Tile `index`, 0 ... tiles (tiles + 1) / 2 - 1, of a lower triangle, column <= row.
//
// Row r from the bottom and row r from the top together fill one row of a rectangle (of an odd number of rows, the
// bottom one stands alone). The rectangle is taken in bands of `group` rows.
KORE_HOST_DEVICE Tile tile_of_triangle(int index, int tiles, int group) {
    const int odd = tiles & 1;
    const Tile folded = tile_of_rectangle(index, (tiles + 1) / 2, tiles + 1 - odd, group);
    const int bottom = tiles - folded.row;
    if (folded.column < bottom) return {bottom - 1, folded.column};
    return {folded.row - odd, folded.column - bottom};
}

// What one block of a cluster of two computes of a triangle of squares, which are 2 x 2 cells of 128 x 128.
//
// Below the diagonal, a cluster takes a square, a block one row of it (SQUARE). A square on the diagonal has three cells
// in the triangle: a row of two (STRIP) and one in a corner. To lose nothing, a cluster takes the strips of two squares,
// or the corners of four (CORNERS, two a block, at `column` and `other` on the diagonal). Every cluster then multiplies
// four cells. Those of the diagonal, which are slow to write, come first. Squares beyond the last one have no effect.
struct Piece {
    enum Kind { SQUARE, STRIP, CORNERS } kind;
    int row, column, other;  // in cells
};

KORE_HOST_DEVICE int pieces_of_triangle(int squares) {
    return squares * (squares - 1) / 2 + ceil_div(squares, 2) + ceil_div(squares, 4);
}

KORE_HOST_DEVICE Piece piece_of_triangle(int index, int rank, int squares, bool upper, int group) {
    const int strips = ceil_div(squares, 2), corners = ceil_div(squares, 4);
    if (index < strips) {
        const int square = 2 * index + rank;
        return {Piece::STRIP, 2 * square + !upper, 2 * square, 0};
    }
    if (index < strips + corners) {
        const int square = 4 * (index - strips) + 2 * rank;
        return {Piece::CORNERS, 0, 2 * square + upper, 2 * square + 2 + upper};
    }
    const Tile tile = tile_of_triangle(index - strips - corners, squares - 1, group);
    const int row = upper ? tile.column : tile.row + 1, column = upper ? tile.row + 1 : tile.column;
    return {Piece::SQUARE, 2 * row + rank, 2 * column, 0};
}

// Tiles rarely divide evenly among the clusters. The first `whole` tiles are summed at once; the sum of each of the
// others is cut into `parts` of `part_blocks` blocks (the last part may have fewer), whose results are added later.
struct Schedule {
    int tiles, blocks;
    int whole, parts, part_blocks;

    KORE_HOST_DEVICE int cut() const { return tiles - whole; }
    KORE_HOST_DEVICE int items() const { return whole + cut() * parts; }
    KORE_HOST_DEVICE bool is_part(int item) const { return item >= whole; }
    KORE_HOST_DEVICE int tile(int item) const { return is_part(item) ? whole + (item - whole) / parts : item; }
    KORE_HOST_DEVICE int first_block(int item) const {
        return is_part(item) ? (item - whole) % parts * part_blocks : 0;
    }
    KORE_HOST_DEVICE int count(int item) const {
        return is_part(item) ? smaller(part_blocks, blocks - first_block(item)) : blocks;
    }
};

// Every tile by itself.
inline Schedule whole_tiles(int tiles, int blocks) { return {tiles, blocks, tiles, 1, blocks}; }

// As many parts as make the last, partial wave shortest. In the time of a block: writing a tile takes about 3, the
// kernel that adds the parts 5, and reading a part again 0.15.
inline Schedule cut_last_wave(int tiles, int blocks, int clusters) {
    constexpr double WRITE = 3, ADD = 5, READ = 0.15;
    const int cut = tiles % clusters;
    if (cut == 0) return whole_tiles(tiles, blocks);
    int best = 1;
    double shortest = blocks + WRITE;
    for (int parts = 2; parts <= blocks && cut * parts <= clusters; ++parts) {
        const double length = ceil_div(blocks, parts) + WRITE + ADD + READ * cut * parts;
        if (length < shortest) {
            shortest = length;
            best = parts;
        }
    }
    if (best == 1) return whole_tiles(tiles, blocks);
    const int part_blocks = ceil_div(blocks, best);
    return {tiles, blocks, tiles - cut, ceil_div(blocks, part_blocks), part_blocks};
}

}  // namespace kore
