// Dropout for one instruction set. Included by the translation unit of each, as microkernel.h is and for its reason.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace {

constexpr int QUADS = 64;  // evaluations of the generator at a time, each for four columns

// Philox 4x32-10 for the counters (first + i, row, 0, 0): kept[4 * i + w] is all ones if word w of them keeps.
inline void keep(uint32_t first, uint32_t row, const kore::Mask& mask, uint32_t* __restrict kept) {
    for (int i = 0; i < QUADS; ++i) {
        uint32_t c[4] = {first + uint32_t(i), row, 0, 0}, key[2] = {mask.key[0], mask.key[1]};
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t low = uint64_t(c[0]) * 0xD2511F53u, high = uint64_t(c[2]) * 0xCD9E8D57u;
            c[0] = uint32_t(high >> 32) ^ c[1] ^ key[0];
            c[1] = uint32_t(high);
            c[2] = uint32_t(low >> 32) ^ c[3] ^ key[1];
            c[3] = uint32_t(low);
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) kept[4 * i + w] = c[w] >> 1 >= mask.threshold ? ~0u : 0u;
    }
}

template <class Element>
void drop_row(const void* source, int64_t stride, int64_t columns, int64_t row, const kore::Mask& mask, void* target) {
    const Element* x = static_cast<const Element*>(source);
    Element* out = static_cast<Element*>(target);
    uint32_t kept[4 * QUADS];
    for (int64_t first = 0; first < columns; first += 4 * QUADS) {
        const int64_t count = std::min<int64_t>(4 * QUADS, columns - first);
        keep(uint32_t(first / 4), uint32_t(row), mask, kept);
        if (stride == 1) {
            for (int64_t j = 0; j < count; ++j) out[first + j] = kept[j] ? x[first + j] : Element(0);
        } else {
            for (int64_t j = 0; j < count; ++j) out[first + j] = kept[j] ? x[(first + j) * stride] : Element(0);
        }
    }
}

inline kore::DropRow drop_row_of(int element_bytes) {
    switch (element_bytes) {
        case 2:
            return drop_row<uint16_t>;
        case 4:
            return drop_row<uint32_t>;
        case 8:
            return drop_row<uint64_t>;
        default:
            return nullptr;
    }
}

}  // namespace
