// Mirrors one triangle of a matrix onto the other, tile by tile through a small copy: rows are read and written whole.
#include <algorithm>

#include "../kore.h"

namespace {

constexpr int64_t TILE = 64;
constexpr int64_t SMALL = 512;  // a matrix of this size is not worth waking a thread

// The tile of `rows` x `columns` at (i, j) becomes the mirror of the one at (j, i); on the diagonal, its other half.
template <class Element>
void mirror(Element* C, int64_t d, int64_t i, int64_t j, bool upper) {
    Element tile[TILE][TILE + 1];
    const int64_t rows = std::min(TILE, d - i), columns = std::min(TILE, d - j);
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < rows; ++r) tile[r][c] = C[(j + c) * d + i + r];
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = i == j && !upper ? r + 1 : 0, to = i == j && upper ? r : columns;
        for (int64_t c = from; c < to; ++c) C[(i + r) * d + j + c] = tile[r][c];
    }
}

template <class Element>
void symmetrize(Element* C, int64_t d, bool upper, int threads) {
    const int64_t tiles = (d + TILE - 1) / TILE;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && d > SMALL)
    for (int64_t i = 0; i < tiles; ++i)
        for (int64_t j = 0; j <= i; ++j)
            upper ? mirror(C, d, i * TILE, j * TILE, upper) : mirror(C, d, j * TILE, i * TILE, upper);
}

}  // namespace

int kore_symmetrize(void* C, int64_t d, int element_bytes, int upper, int threads) {
    if (d < 0 || threads < 1) return KORE_INVALID_ARGUMENT;
    if (element_bytes == 4)
        symmetrize(static_cast<uint32_t*>(C), d, upper != 0, threads);
    else if (element_bytes == 8)
        symmetrize(static_cast<uint64_t*>(C), d, upper != 0, threads);
    else
        return KORE_INVALID_ARGUMENT;
    return KORE_OK;
}
