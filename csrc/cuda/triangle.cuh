// One triangle of C (d, d), to which scale() times a sum is added.
#pragma once

#include <cstdint>

namespace kore {

struct Triangle {
    float* C;
    int64_t d;
    float alpha;
    const float* alpha_factor;
    bool upper;

    __device__ float scale() const { return alpha_factor ? alpha * *alpha_factor : alpha; }

    // Row i of C from column j on, as far as it lies in the triangle: where columns j + first ... j + last are.
    struct Row {
        float* at;
        int first, last;
        bool pairs;  // whether two even columns are one aligned word

        __device__ bool has(int column) const { return first <= column && column <= last; }
    };

    __device__ Row row(int i, int j) const {
        const int end = int(d) - 1;
        float* at = C + i * d + j;
        return {at, upper ? i - j : -j, (i > end ? -1 : upper ? end : i) - j, reinterpret_cast<uintptr_t>(at) % 8 == 0};
    }
};

}  // namespace kore
