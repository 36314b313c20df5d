// One triangle of C += alpha * sum of w x^T x, for any instruction set.
//
// Chunks of the kept rows are packed into panels, a few columns of x each. Then every thread takes square blocks of the
// triangle; a block stays in its cache while all rows of the chunk are multiplied into it. Which thread takes a block
// has no influence on its numbers.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernel.h"

namespace {

using kore::Kernel;
using kore::Rows;

constexpr int64_t BLOCK = 96;             // edge of a block of C, a multiple of every kernel's rows and columns
constexpr int64_t LONGEST_SUM = 192;      // rows that are summed before they are added to C, which bounds the rounding
constexpr int64_t CHUNK_BYTES = 6 << 20;  // packed at a time ...
constexpr int64_t CHUNK_ROWS = 384;       // ... but at least so many rows, as C passes through memory once a chunk
constexpr int64_t LARGE_PAGE = 2 << 20;
constexpr double SMALL = 4e6;             // multiplications that are not worth waking a thread

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};

// Kept between the calls of a thread: new memory costs more, page by page, than packing into it. In large pages where
// the system has them, as panels are read from all over.
char* workspace(int64_t bytes) {
    thread_local std::unique_ptr<char, Free> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset();
        const int64_t page = bytes < LARGE_PAGE ? 64 : LARGE_PAGE, whole = ceil_div(bytes, page) * page;
        memory.reset(static_cast<char*>(std::aligned_alloc(page, whole)));
        if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (page == LARGE_PAGE) madvise(memory.get(), whole, MADV_HUGEPAGE);
#endif
        size = bytes;
    }
    return memory.get();
}

class Update {
public:
    Update(float* C, int64_t d, float alpha, bool upper, const Kernel& kernel, const Rows& x, int64_t kept)
        : C(C), d(d), alpha(alpha), upper(upper), kernel(kernel), x(x), kept(kept) {
        // Weights belong to one of the two factors, so that they may have any sign.
        two_sides = x.scale || kernel.pack_left != kernel.pack_right;
        panels = ceil_div(d, kernel.columns);
        step_width = int64_t(kernel.columns) * kernel.step_bytes;
        longest = LONGEST_SUM / kernel.depth;
        const int64_t bytes_of_a_row = panels * step_width / kernel.depth * (two_sides ? 2 : 1);
        const int64_t rows = std::max(CHUNK_ROWS, CHUNK_BYTES / bytes_of_a_row / LONGEST_SUM * LONGEST_SUM);
        chunk = std::min(rows, ceil_div(kept, kernel.depth) * kernel.depth);
        panel_bytes = chunk / kernel.depth * step_width;
        right = workspace(panels * panel_bytes * (two_sides ? 2 : 1));
        left = two_sides ? right + panels * panel_bytes : right;
        for (int64_t i = 0; i < d; i += BLOCK)
            for (int64_t j = 0; j <= i; j += BLOCK) blocks.push_back(upper ? Block{j, i} : Block{i, j});
    }

    void run(int threads) {
        const double work = 0.5 * double(d) * double(d) * double(kept);
#pragma omp parallel num_threads(threads) if (threads > 1 && work > SMALL)
        for (int64_t start = 0; start < kept; start += chunk) {
            const int64_t count = std::min(chunk, kept - start);
            const int64_t steps = ceil_div(count, kernel.depth), parts = ceil_div(steps, longest);
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < panels * parts; ++unit)
                pack(unit / parts, start, count, unit % parts * longest);
#pragma omp for schedule(dynamic)
            for (size_t unit = 0; unit < blocks.size(); ++unit)
                for (int64_t step = 0; step < steps; step += longest)
                    multiply(blocks[unit], step, std::min(longest, steps - step));
        }
    }

private:
    struct Block {
        int64_t i, j;
    };
    enum Cover { NONE, PART, WHOLE };

    // The steps of one panel from `step` on, as many as are multiplied at a time.
    void pack(int64_t panel, int64_t start, int64_t count, int64_t step) const {
        const int64_t row = step * kernel.depth, first = panel * kernel.columns;
        const int64_t columns = std::min<int64_t>(kernel.columns, d - first);
        const int64_t rows = std::min(longest * kernel.depth, count - row);
        const int64_t offset = panel * panel_bytes + step * step_width;
        Rows part = x;
        part.index += start + row;
        part.scale = x.scale ? x.scale + start + row : nullptr;
        if (two_sides) kernel.pack_left(part, rows, first, columns, left + offset);
        part.scale = nullptr;
        kernel.pack_right(part, rows, first, columns, right + offset);
    }

    void multiply(Block block, int64_t step, int64_t steps) const {
        for (int64_t j = block.j; j < std::min(block.j + BLOCK, d); j += kernel.columns) {
            const char* b = right + j / kernel.columns * panel_bytes + step * step_width;
            for (int64_t i = block.i; i < std::min(block.i + BLOCK, d); i += kernel.rows) {
                const char* panel = left + i / kernel.columns * panel_bytes + step * step_width;
                tile(i, j, panel + i % kernel.columns * kernel.step_bytes, b, steps);
            }
        }
    }

    void tile(int64_t i, int64_t j, const char* a, const char* b, int64_t steps) const {
        const Cover covered = cover(i, j);
        if (covered == WHOLE) kernel.multiply(a, b, steps, alpha, C + i * d + j, d);
        if (covered != PART) return;
        float sum[kore::MAX_TILE] = {};
        const int half = kernel.columns / 2;
        const bool in_half = kernel.multiply_half && (upper ? i >= j + half : i + kernel.rows <= j + half);
        const int skipped = in_half && upper ? half : 0;
        (in_half ? kernel.multiply_half : kernel.multiply)(
            a, b + skipped * kernel.step_bytes, steps, alpha, sum + skipped, kernel.columns
        );
        const int64_t end_i = std::min(d, i + kernel.rows), end_j = std::min(d, j + kernel.columns);
        for (int64_t row = i; row < end_i; ++row) {
            const int64_t from = upper ? std::max(j, row) : j, to = upper ? end_j : std::min(end_j, row + 1);
            for (int64_t column = from; column < to; ++column)
                C[row * d + column] += sum[(row - i) * kernel.columns + column - j];
        }
    }

    // How much of the tile at (i, j) lies in C and in its triangle.
    Cover cover(int64_t i, int64_t j) const {
        const int64_t last_i = i + kernel.rows - 1, last_j = j + kernel.columns - 1;
        if (upper ? i > last_j : j > last_i) return NONE;
        const bool inside = last_i < d && last_j < d;
        return inside && (upper ? last_i <= j : last_j <= i) ? WHOLE : PART;
    }

    float* C;
    int64_t d;
    float alpha;
    bool upper;
    const Kernel& kernel;
    Rows x;
    int64_t kept;

    bool two_sides;
    int64_t panels, step_width, longest, chunk, panel_bytes;
    char *left, *right;
    std::vector<Block> blocks;
};

}  // namespace

int kore_covariance_update(
    float* C,
    int64_t d,
    const void* x,
    int64_t n,
    int64_t stride_row,
    int64_t stride_column,
    int dtype,
    const uint8_t* mask,
    const float* weight,
    float alpha,
    int upper,
    int isa,
    int threads
) {
    if (d < 0 || n < 0 || threads < 1 || dtype < KORE_FLOAT32 || dtype > KORE_FLOAT16) return KORE_INVALID_ARGUMENT;
    if (isa < KORE_PORTABLE || isa > kore_cpu_isa()) return KORE_UNSUPPORTED_ISA;
    try {
        std::vector<int64_t> index;
        std::vector<float> scale;
        index.reserve(n);
        for (int64_t row = 0; row < n; ++row) {
            if (mask && !mask[row]) continue;
            index.push_back(row);
            if (weight) scale.push_back(weight[row]);
        }
        const int64_t kept = int64_t(index.size());
        if (d == 0 || kept == 0) return KORE_OK;
        const Rows rows{x, stride_row, stride_column, index.data(), weight ? scale.data() : nullptr};
        const Kernel& kernel = kore::select(isa, kore_dtype(dtype), weight != nullptr);
        Update(C, d, alpha, upper != 0, kernel, rows, kept).run(threads);
    } catch (const std::bad_alloc&) {
        return KORE_OUT_OF_MEMORY;
    }
    return KORE_OK;
}
