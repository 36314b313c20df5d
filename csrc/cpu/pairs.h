// Packing of bfloat16 in pairs: the products of two neighbouring rows of x are summed by one instruction.
#pragma once

#include "microkernel.h"

namespace {

// panel[step][column] = (row 2 * step, row 2 * step + 1), with steps for a multiple of DEPTH rows.
template <int COLUMNS, int DEPTH>
void pack_pairs(const Rows& rows, int64_t count, int64_t first, int64_t columns, void* panel) {
    const BFloat16* x = static_cast<const BFloat16*>(rows.x) + first * rows.stride_column;
    uint32_t* out = static_cast<uint32_t*>(panel);
    const int64_t padded = (count + DEPTH - 1) / DEPTH * DEPTH;
    for (int64_t n = 0; n < padded; n += 2, out += COLUMNS) {
        const BFloat16* low = n < count ? x + rows.index[n] * rows.stride_row : nullptr;
        const BFloat16* high = n + 1 < count ? x + rows.index[n + 1] * rows.stride_row : nullptr;
        if (high && columns == COLUMNS && rows.stride_column == 1) {
            for (int c = 0; c < COLUMNS; ++c) out[c] = low[c].bits | uint32_t(high[c].bits) << 16;
        } else {
            for (int64_t c = 0; c < COLUMNS; ++c) {
                const int64_t at = c * rows.stride_column;
                const uint32_t first_bits = low && c < columns ? low[at].bits : 0;
                const uint32_t second_bits = high && c < columns ? high[at].bits : 0;
                out[c] = first_bits | second_bits << 16;
            }
        }
    }
}

}  // namespace
