// AMX-BF16: a (32, 32) tile of C from four tile registers; one instruction takes 32 rows of x for (16, 16) of them.
#include <immintrin.h>

#include "pairs.h"

namespace {

constexpr int EDGE = 32, DEPTH = 32, PAIRS = DEPTH / 2;

// The left factor as tile registers want it: panel[step][column][pair], the transpose of pack_pairs step by step.
void pack_transposed_pairs(const Rows& rows, int64_t count, int64_t first, int64_t columns, void* panel) {
    uint32_t step[PAIRS][EDGE];
    uint32_t* out = static_cast<uint32_t*>(panel);
    Rows part = rows;
    for (int64_t n = 0; n < count; n += DEPTH, part.index += DEPTH, out += EDGE * PAIRS) {
        pack_pairs<EDGE, DEPTH>(part, count - n < DEPTH ? count - n : DEPTH, first, columns, step);
        for (int c = 0; c < EDGE; ++c)
            for (int p = 0; p < PAIRS; ++p) out[c * PAIRS + p] = step[p][c];
    }
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 are the quarters of C, 4 and 5 the left factor's halves, 6 and 7 the right one's.
void multiply_tiles(const void* left, const void* right, int64_t steps, float alpha, float* C, int64_t stride) {
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint32_t* a = static_cast<const uint32_t*>(left);
    const uint32_t* b = static_cast<const uint32_t*>(right);
    for (int64_t step = 0; step < steps; ++step, a += EDGE * PAIRS, b += PAIRS * EDGE) {
        _tile_loadd(4, a, 4 * PAIRS);
        _tile_loadd(6, b, 4 * EDGE);
        _tile_loadd(7, b + 16, 4 * EDGE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * PAIRS, 4 * PAIRS);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float sum[EDGE][EDGE];
    _tile_stored(0, &sum[0][0], sizeof sum[0]);
    _tile_stored(1, &sum[0][16], sizeof sum[0]);
    _tile_stored(2, &sum[16][0], sizeof sum[0]);
    _tile_stored(3, &sum[16][16], sizeof sum[0]);
    _tile_release();
    for (int i = 0; i < EDGE; ++i)
        for (int j = 0; j < EDGE; ++j) C[i * stride + j] += alpha * sum[i][j];
}

}  // namespace

const kore::Kernel& kore::amx_bf16_kernel() {
    static constexpr Kernel kernel = {
        EDGE, EDGE, DEPTH, DEPTH * 2, pack_transposed_pairs, pack_pairs<EDGE, DEPTH>, multiply_tiles, nullptr,
    };
    return kernel;
}
