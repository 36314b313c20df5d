// How the Ampere kernels lay out tiles in shared memory. Plain C++, for the host and the GPU.
//
// A stage holds BLOCK steps of the summed dimension for TILE rows of the left factor and TILE columns of the right one.
// Shared memory has rows of 64 bytes (one of the factor's own index, over the steps: SUMMED) or 256 bytes (one step, over
// the tile: OWN), whose pieces of 16 bytes are swizzled so that neither the copies nor the loads of 8 x 8 matrices meet
// in a bank.
#pragma once

#include "tiles.h"

namespace kore::ampere {

constexpr int TILE = 128, BLOCK = 32;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int WARP_TILE = 64;          // the warps multiply 2 x 2 squares of 64 x 64
constexpr int STAGES = 3;              // 48 KiB: two blocks fit into the 100 KiB of 8.6, 8.9 and 12.0
constexpr int PIECE = 8;               // elements of 16 bytes
constexpr int FACTOR_BYTES = TILE * BLOCK * 2, STAGE_BYTES = 2 * FACTOR_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES;
constexpr int PIECES = TILE * BLOCK / PIECE / THREADS;  // of a factor that one thread copies

constexpr int REGISTER_BLOCKS = 2;     // blocks whose registers fit into a processor

// A piece of a tile of a factor: `own` and `step` of its first element, and its place in shared memory.
struct Place {
    int own, step, offset;
};

KORE_HOST_DEVICE int offset_summed(int own, int step) {
    return own * (BLOCK * 2) + ((step / PIECE) ^ (own / 2 % 4)) * 16;
}

KORE_HOST_DEVICE int offset_own(int own, int step) {
    return step * (TILE * 2) + ((own / PIECE) ^ (step % 8)) * 16;
}

// Piece i (0 ... PIECES - 1) that a thread copies.
KORE_HOST_DEVICE Place copied(bool own_contiguous, int thread, int i) {
    const int index = i * THREADS + thread;
    if (own_contiguous) {
        const int own = index % (TILE / PIECE) * PIECE, step = index / (TILE / PIECE);
        return {own, step, offset_own(own, step)};
    }
    const int own = index / (BLOCK / PIECE), step = index % (BLOCK / PIECE) * PIECE;
    return {own, step, offset_summed(own, step)};
}

// The row of an 8 x 8 matrix, which begins at (own, step), whose address a lane gives to load_matrices.
KORE_HOST_DEVICE int matrix_row(bool own_contiguous, int own, int step, int lane) {
    return own_contiguous ? offset_own(own, step + lane % 8) : offset_summed(own + lane % 8, step);
}

// The same for the matrices that multiply_add takes: 16 rows of the left factor, or 16 columns of the right one, and 16
// steps. The warps lie 2 x 2 over the tile.
KORE_HOST_DEVICE int left_row(bool own_contiguous, int thread, int m, int step) {
    const int lane = thread % 32, matrix = lane / 8;
    const int own = thread / 64 * WARP_TILE + 16 * m + matrix % 2 * 8;
    return matrix_row(own_contiguous, own, step + matrix / 2 * 8, lane);
}

KORE_HOST_DEVICE int right_row(bool own_contiguous, int thread, int n, int step) {
    const int lane = thread % 32, matrix = lane / 8;
    const int own = thread / 32 % 2 * WARP_TILE + 16 * n + matrix / 2 * 8;
    return matrix_row(own_contiguous, own, step + matrix % 2 * 8, lane);
}

// Bytes of a piece of 8 elements from `first` on that exist among `count`.
KORE_HOST_DEVICE int bytes_of_piece(int64_t first, int64_t count) {
    const int64_t left = count - first;
    return left >= PIECE ? 16 : left > 0 ? int(left) * 2 : 0;
}

// Where the sums of a thread lie in its block's tile: sum[m][n][2 h + e] at row_of_sum + 16 m + 8 h,
// column_of_sum + 8 n + e.
constexpr int SUMS_DOWN = WARP_TILE / 16, SUMS_RIGHT = WARP_TILE / 8;

KORE_HOST_DEVICE int row_of_sum(int thread) { return thread / 64 * WARP_TILE + thread % 32 / 4; }
KORE_HOST_DEVICE int column_of_sum(int thread) { return thread / 32 % 2 * WARP_TILE + thread % 4 * 2; }

}  // namespace kore::ampere
