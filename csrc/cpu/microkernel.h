// Packing and multiplying for one instruction set. Included by the translation unit of each; the anonymous namespace
// keeps code that was compiled for one processor from being linked into the path of another.
#pragma once

#include <cstring>

#include "kernel.h"

namespace {

using kore::Rows;

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

// Exact: moving the exponent's place leaves it 112 too small, for normal and subnormal numbers alike.
inline float widen(Float16 value) {
    const uint32_t magnitude = value.bits & 0x7fffu, sign = uint32_t(value.bits & 0x8000u) << 16;
    const float finite = from_bits(magnitude << 13) * 0x1p112f;
    const float special = from_bits(0x7f800000u | magnitude << 13);
    const float absolute = magnitude >= 0x7c00u ? special : finite;
    return sign ? -absolute : absolute;
}

// One float per row and column: panel[step][column].
template <class Element, int COLUMNS>
void pack_floats(const Rows& rows, int64_t count, int64_t first, int64_t columns, void* panel) {
    const Element* x = static_cast<const Element*>(rows.x) + first * rows.stride_column;
    float* out = static_cast<float*>(panel);
    for (int64_t n = 0; n < count; ++n, out += COLUMNS) {
        const Element* row = x + rows.index[n] * rows.stride_row;
        const float scale = rows.scale ? rows.scale[n] : 1.0f;
        if (columns == COLUMNS && rows.stride_column == 1) {
            for (int c = 0; c < COLUMNS; ++c) out[c] = scale * widen(row[c]);
        } else {
            for (int64_t c = 0; c < COLUMNS; ++c)
                out[c] = c < columns ? scale * widen(row[c * rows.stride_column]) : 0.0f;
        }
    }
}

// The sum of products is kept in ROWS x VECTORS registers of LANES floats. Left and right are read four bytes at a
// time: a float, or two bfloat16 of neighbouring rows of x, as Dot has it. A step of a panel is PANEL of these wide.
template <class Dot, int LANES, int ROWS, int VECTORS, int PANEL = LANES * VECTORS>
void multiply(const void* left, const void* right, int64_t steps, float alpha, float* C, int64_t stride) {
    typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
    typedef float Packed __attribute__((vector_size(LANES * sizeof(float)), may_alias));
    typedef float Unaligned __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
    using Scalar = typename Dot::Scalar;
    constexpr int COLUMNS = LANES * VECTORS;

    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; j += 16) __builtin_prefetch(C + i * stride + j, 1);

    Vector sum[ROWS][VECTORS] = {};
    const Scalar* a = static_cast<const Scalar*>(left);
    const float* b = static_cast<const float*>(right);
    for (int64_t step = 0; step < steps; ++step, a += PANEL, b += PANEL) {
        Vector columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) columns[v] = *reinterpret_cast<const Packed*>(b + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = Dot::add(sum[i][v], a[i], columns[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            Unaligned* cells = reinterpret_cast<Unaligned*>(C + i * stride + v * LANES);
            *cells = *cells + alpha * sum[i][v];
        }
}

template <class Dot, int LANES, int ROWS, int VECTORS>
constexpr kore::Multiply multiply_half() {
    if constexpr (VECTORS % 2 == 0) return multiply<Dot, LANES, ROWS, VECTORS / 2, LANES * VECTORS>;
    return nullptr;
}

// a * b in float32; the compiler fuses the addition where the instruction set can.
struct Float32Dot {
    using Scalar = float;
    template <class Vector>
    static Vector add(Vector sum, float a, Vector b) {
        return sum + a * b;
    }
};

template <class Element, int LANES, int ROWS, int VECTORS>
constexpr kore::Kernel float32_kernel() {
    return {
        ROWS,
        LANES * VECTORS,
        1,
        sizeof(float),
        pack_floats<Element, LANES * VECTORS>,
        pack_floats<Element, LANES * VECTORS>,
        multiply<Float32Dot, LANES, ROWS, VECTORS>,
        multiply_half<Float32Dot, LANES, ROWS, VECTORS>(),
    };
}

// The kernels of one instruction set for every dtype: two-byte elements become float32 when they are packed.
template <int LANES, int ROWS, int VECTORS>
const kore::Kernel& float32_kernel(kore_dtype dtype) {
    static constexpr kore::Kernel kernels[] = {
        float32_kernel<float, LANES, ROWS, VECTORS>(),
        float32_kernel<BFloat16, LANES, ROWS, VECTORS>(),
        float32_kernel<Float16, LANES, ROWS, VECTORS>(),
    };
    return kernels[dtype];
}

}  // namespace
