// Zeros where the dropout mask drops; row by row, so that threads and instruction sets have no influence on the bits.
#include "kernel.h"

namespace {

constexpr int64_t SMALL = 1 << 15;  // elements that are not worth waking a thread

}  // namespace

int kore_dropout(
    const void* x,
    int64_t rows,
    int64_t columns,
    int64_t stride_row,
    int64_t stride_column,
    int element_bytes,
    int64_t first_row,
    int64_t seed,
    int64_t threshold,
    void* out,
    int isa,
    int threads
) {
    if (rows < 0 || columns < 0 || first_row < 0 || threshold < 0 || threshold > INT32_MAX || threads < 1)
        return KORE_INVALID_ARGUMENT;
    if (isa < KORE_PORTABLE || isa > kore_cpu_isa()) return KORE_UNSUPPORTED_ISA;
    const kore::DropRow drop_row = kore::select_drop_row(isa, element_bytes);
    if (!drop_row) return KORE_INVALID_ARGUMENT;
    const kore::Mask mask{{uint32_t(seed), uint32_t(uint64_t(seed) >> 32)}, uint32_t(threshold)};
    const char* from = static_cast<const char*>(x);
    char* to = static_cast<char*>(out);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > SMALL)
    for (int64_t i = 0; i < rows; ++i)
        drop_row(
            from + i * stride_row * element_bytes, stride_column, columns, first_row + i, mask,
            to + i * columns * element_bytes
        );
    return KORE_OK;
}
