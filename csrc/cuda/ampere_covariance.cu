// One triangle of C += alpha x^T x on Ampere and newer, for x (n, d) bfloat16 or float16.
//
// A block takes a tile of 128 x 128 of the triangle; both factors are x itself, its own dimension contiguous. Tiles of
// the last, partial wave are cut along the rows of x; a second kernel adds their parts in order. Every element of C is
// added to once, so the bits repeat.
#include "ampere_mainloop.cuh"
#include "triangle.cuh"

namespace kore::ampere {
namespace {

constexpr int GROUP = 8;  // rows of tiles in a band

struct Update : Triangle {
    int tiles;  // down
    Schedule schedule;
    float4* parts;

    __device__ Tile tile(int item) const {
        const Tile tile = tile_of_triangle(schedule.tile(item), tiles, GROUP);
        return upper ? Tile{tile.column, tile.row} : tile;
    }

    // Adds SUMS_RIGHT pairs, 8 columns apart, to row i from column j on. A row that lies whole in the triangle is read
    // at once.
    __device__ void add(int i, int j, const float2 (&pairs)[SUMS_RIGHT]) const {
        const Row to = row(i, j);
        if (to.pairs && to.has(0) && to.has(8 * SUMS_RIGHT - 7)) {
            float2* at = reinterpret_cast<float2*>(to.at);
            float2 old[SUMS_RIGHT];
#pragma unroll
            for (int n = 0; n < SUMS_RIGHT; ++n) old[n] = at[4 * n];
#pragma unroll
            for (int n = 0; n < SUMS_RIGHT; ++n) at[4 * n] = make_float2(old[n].x + pairs[n].x, old[n].y + pairs[n].y);
            return;
        }
#pragma unroll
        for (int n = 0; n < SUMS_RIGHT; ++n) {
            if (to.has(8 * n)) to.at[8 * n] += pairs[n].x;
            if (to.has(8 * n + 1)) to.at[8 * n + 1] += pairs[n].y;
        }
    }
};

template <class T>
__global__ void __launch_bounds__(THREADS, REGISTER_BLOCKS) covariance_kernel(
    const Factor<T, Contiguous::OWN> x, const Update update
) {
    extern __shared__ uint8_t shared[];
    const Schedule& schedule = update.schedule;
    const int item = blockIdx.x;
    const Tile tile = update.tile(item);
    const int row = tile.row * TILE, column = tile.column * TILE;
    Sums<T> sums;
    sums.clear();
    sums.multiply(shared_address(shared), x, x, row, column, schedule.first_block(item), schedule.count(item));
    if (schedule.is_part(item)) {
        write_part(update.parts, sums, item - schedule.whole);
        return;
    }
    const float scale = update.scale();
    const int i = row + row_of_sum(threadIdx.x), j = column + column_of_sum(threadIdx.x);
#pragma unroll
    for (int k = 0; k < 2 * SUMS_DOWN; ++k) {
        float2 pairs[SUMS_RIGHT];
#pragma unroll
        for (int n = 0; n < SUMS_RIGHT; ++n) {
            const float* s = sums.sum[k / 2][n] + k % 2 * 2;
            pairs[n] = make_float2(scale * s[0], scale * s[1]);
        }
        update.add(i + 8 * k, j, pairs);
    }
}

// Blocks: (cut tile, m). Threads: as those that multiplied.
__global__ void __launch_bounds__(THREADS) add_parts_kernel(const Update update) {
    const Tile tile = update.tile(update.schedule.whole + blockIdx.x * update.schedule.parts);
    const float scale = update.scale();
    float2 above[SUMS_RIGHT], below[SUMS_RIGHT];
#pragma unroll
    for (int n = 0; n < SUMS_RIGHT; ++n) {
        const float4 sum = add_parts(update.parts, blockIdx.x, update.schedule.parts, blockIdx.y * SUMS_RIGHT + n);
        above[n] = make_float2(scale * sum.x, scale * sum.y);
        below[n] = make_float2(scale * sum.z, scale * sum.w);
    }
    const int i = tile.row * TILE + row_of_sum(threadIdx.x) + blockIdx.y * 16;
    const int j = tile.column * TILE + column_of_sum(threadIdx.x);
    update.add(i, j, above);
    update.add(i + 8, j, below);
}

Schedule plan(int64_t n, int64_t d, const Device& device) {
    const int tiles = ceil_div(d, TILE);
    return cut_last_wave(tiles * (tiles + 1) / 2, ceil_div(n, BLOCK), blocks_at_once(device));
}

int64_t part_bytes(const Schedule& schedule) { return schedule.cut() * schedule.parts * PART_BYTES; }

template <class T>
void run(const CovarianceCall& call, const Update& update, Status& status) {
    const Schedule& schedule = update.schedule;
    const Factor<T, Contiguous::OWN> x{static_cast<const T*>(call.x), call.stride_row, int(call.d), int(call.n)};
    covariance_kernel<T><<<schedule.items(), THREADS, SHARED_BYTES, call.stream>>>(x, update);
    status.check(cudaGetLastError());
    if (!status.ok() || schedule.cut() == 0) return;
    add_parts_kernel<<<dim3(schedule.cut(), SUMS_DOWN), THREADS, 0, call.stream>>>(update);
    status.check(cudaGetLastError());
}

}  // namespace

int64_t covariance_workspace(int64_t n, int64_t d, const Device& device) { return part_bytes(plan(n, d, device)); }

void covariance_update(const CovarianceCall& call, const Device& device, Status& status) {
    const Update update{
        {call.C, call.d, call.alpha, call.alpha_factor, call.upper},
        ceil_div(call.d, TILE),
        plan(call.n, call.d, device),
        static_cast<float4*>(call.workspace)
    };
    if (call.dtype == KORE_BFLOAT16)
        run<__nv_bfloat16>(call, update, status);
    else
        run<__half>(call, update, status);
}

}  // namespace kore::ampere
