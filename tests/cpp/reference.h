// The CPU operations in double, one line each, and matrices that lie in memory as a caller's may.
#pragma once

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "test.h"

namespace test {

// (rows, columns) of a dtype with any strides, in an allocation that ends with its last element.
class Input {
public:
    Input(int64_t rows, int64_t columns, int64_t stride_row, int64_t stride_column, int dtype, std::mt19937& random)
        : rows(rows), columns(columns), stride_row(stride_row), stride_column(stride_column), dtype(dtype) {
        const int64_t last = rows && columns ? (rows - 1) * stride_row + (columns - 1) * stride_column + 1 : 0;
        bytes = std::make_unique<char[]>(last * size());
        std::memset(bytes.get(), 0xff, last * size());  // NaN
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) set(i, j, normal(random));
    }

    int size() const { return dtype == KORE_FLOAT32 ? 4 : 2; }
    const void* data() const { return bytes.get(); }

    void set(int64_t i, int64_t j, float value) {
        char* at = bytes.get() + (i * stride_row + j * stride_column) * size();
        const uint16_t half = dtype == KORE_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
        std::memcpy(at, dtype == KORE_FLOAT32 ? static_cast<const void*>(&value) : &half, size());
    }

    double get(int64_t i, int64_t j) const {
        const char* at = bytes.get() + (i * stride_row + j * stride_column) * size();
        if (dtype == KORE_FLOAT32) {
            float value;
            std::memcpy(&value, at, 4);
            return value;
        }
        uint16_t half;
        std::memcpy(&half, at, 2);
        return dtype == KORE_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
    }

    const int64_t rows, columns, stride_row, stride_column;
    const int dtype;

private:
    std::unique_ptr<char[]> bytes;
};

// Checks C = before + alpha sum w x^T x in one triangle, to float32's rounding of the sum, and `before` in the other.
inline void check_covariance(
    const std::vector<float>& C,
    const std::vector<float>& before,
    const Input& x,
    const uint8_t* mask,
    const float* weight,
    float alpha,
    bool upper,
    const char* what
) {
    const int64_t d = x.columns;
    std::vector<double> sum(d * d), size(d * d), row(d);
    for (int64_t n = 0; n < x.rows; ++n) {
        if (mask && !mask[n]) continue;
        const double factor = double(alpha) * (weight ? weight[n] : 1);
        for (int64_t j = 0; j < d; ++j) row[j] = x.get(n, j);
        for (int64_t i = 0; i < d; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                const double term = factor * row[i] * row[j];
                sum[i * d + j] += term;
                size[i * d + j] += std::fabs(term);
            }
    }
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) {
            const float found = C[i * d + j], old = before[i * d + j];
            if (upper ? i > j : i < j) {
                CHECK(bits_of(found) == bits_of(old), "%s: (%d, %d) is outside the triangle", what, int(i), int(j));
                continue;
            }
            const int64_t at = std::max(i, j) * d + std::min(i, j);
            const double expected = old + sum[at], scale = size[at] + std::fabs(old);
            const double allowed = std::ldexp(double(x.rows + 8), -24) * scale + 1e-30;
            CHECK(std::fabs(found - expected) <= allowed, "%s: (%d, %d) expected %.9g, got %.9g, allowed %.3g", what,
                  int(i), int(j), expected, double(found), allowed);
        }
}

// Whether the mask keeps an element: Philox 4x32-10 as its paper writes it.
inline bool kept(int64_t row, int64_t column, int64_t seed, int64_t threshold) {
    uint32_t c[4] = {uint32_t(column / 4), uint32_t(row), 0, 0}, k[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k[1],
                                  uint32_t(p0)};
        std::memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    return (c[column % 4] >> 1) >= threshold;
}

}  // namespace test
