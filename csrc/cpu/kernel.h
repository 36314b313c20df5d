// What the drivers know of the code for an instruction set: how covariance_update packs x and multiplies what was
// packed, and how dropout treats a row.
#pragma once

#include <cstdint>

#include "../kore.h"

namespace kore {

// Rows of x, in its own dtype and memory layout.
struct Rows {
    const void* x;
    int64_t stride_row, stride_column;
    const int64_t* index;  // the rows that are taken
    const float* scale;    // a factor for each of them, or nullptr
};

// Packs `columns` columns of x, from `first` on, of `count` taken rows. Missing columns and rows become zeros.
using Pack = void (*)(const Rows& rows, int64_t count, int64_t first, int64_t columns, void* panel);

// C[i][j] += alpha * sum over the packed rows of left[i] * right[j], for a whole (rows, columns) tile of C.
using Multiply = void (*)(const void* left, const void* right, int64_t steps, float alpha, float* C, int64_t stride);

// A panel holds kernel.columns columns of x: for every step of `depth` rows of x, `step_bytes` for each column.
struct Kernel {
    int rows, columns;
    int depth;
    int step_bytes;
    Pack pack_left, pack_right;
    Multiply multiply;
    Multiply multiply_half;  // only the first half of the tile's columns, or nullptr
};

constexpr int MAX_TILE = 32 * 32;  // cells of the largest tile

const Kernel& select(int isa, kore_dtype dtype, bool weighted);

// Each is defined in a translation unit of its own that is compiled for that instruction set.
const Kernel& portable_kernel(kore_dtype dtype);
const Kernel& avx2_kernel(kore_dtype dtype);
const Kernel& avx512_kernel(kore_dtype dtype);
const Kernel& avx512_bf16_kernel();
const Kernel& amx_bf16_kernel();

struct Mask {
    uint32_t key[2];
    uint32_t threshold;  // 31-bit words below it are dropped
};

// out[j] = x[j * stride] where the mask keeps element (row, j), else zero.
using DropRow = void (*)(const void* x, int64_t stride, int64_t columns, int64_t row, const Mask& mask, void* out);

// nullptr unless elements have 2, 4 or 8 bytes.
DropRow select_drop_row(int isa, int element_bytes);
DropRow portable_drop_row(int element_bytes);
DropRow avx2_drop_row(int element_bytes);
DropRow avx512_drop_row(int element_bytes);

}  // namespace kore
