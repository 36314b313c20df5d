// out = L R + bias + scaling P Q + add on Ampere and newer, in one pass over out.
//
// The order is that of the Hopper kernel: the low-rank product, scaled, bias and add, then the other product on top; or
// the only product, cut along its summed dimension where there are few tiles. Results leave through shared memory, 16
// bytes a thread.
#include "ampere_mainloop.cuh"
#include "products.cuh"

namespace kore::ampere {
namespace {

template <class T, Contiguous LEFT, Contiguous RIGHT>
struct Factors {
    Factor<T, LEFT> first_left, left;  // the scaled product, and the other one, if there is one
    Factor<T, RIGHT> first_right, right;
};

// This thread's sums, whose first is element (i, j) of out: scaled, with bias and add.
template <class T>
__device__ __forceinline__ void finish_first(const Work<T>& work, Sums<T>& sums, int64_t i, int64_t j) {
#pragma unroll
    for (int n = 0; n < SUMS_RIGHT; ++n) {
        const float2 bias = work.load_bias(j + 8 * n);
#pragma unroll
        for (int m = 0; m < SUMS_DOWN; ++m) {
            float* s = sums.sum[m][n];
            s[0] = work.scaling * s[0] + bias.x;
            s[1] = work.scaling * s[1] + bias.y;
            s[2] = work.scaling * s[2] + bias.x;
            s[3] = work.scaling * s[3] + bias.y;
            if (work.add) {
                const float2 above = work.load_add(i + 16 * m, j + 8 * n), below = work.load_add(i + 16 * m + 8, j + 8 * n);
                s[0] += above.x;
                s[1] += above.y;
                s[2] += below.x;
                s[3] += below.y;
            }
        }
    }
}

// A warp's 64 x 64 sums to out from (row, column) on, through its own 8 KiB of shared memory at `to`.
template <class T>
__device__ __forceinline__ void write_out(const Work<T>& work, const Sums<T>& sums, uint8_t* to, int64_t row, int64_t column) {
    const int lane = threadIdx.x % 32;
    const int64_t left = work.valid - column - lane % 4 * 2;  // columns of this thread that are not padding
#pragma unroll
    for (int k = 0; k < 2 * SUMS_DOWN; ++k)
#pragma unroll
        for (int n = 0; n < SUMS_RIGHT; ++n) {
            const float* s = sums.sum[k / 2][n] + k % 2 * 2;
            const int r = 8 * k + lane / 4;
            const float a = 8 * n < left ? s[0] : 0, b = 8 * n + 1 < left ? s[1] : 0;
            *reinterpret_cast<uint32_t*>(to + r * 128 + (n ^ (r % 8)) * 16 + lane % 4 * 4) = pack<T>(a, b);
        }
    __syncwarp();
#pragma unroll 4
    for (int k = 0; k < WARP_TILE / 4; ++k) {
        const int r = 4 * k + lane / 8, piece = lane % 8;
        const int64_t j = column + piece * PIECE;
        if (row + r >= work.rows || j >= work.columns) continue;
        const uint8_t* from = to + r * 128 + (piece ^ (r % 8)) * 16;
        T* out = work.out + (row + r) * work.stride_out + j;
        if (j + PIECE <= work.columns) {
            *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (int e = 0; e < work.columns - j; ++e) out[e] = reinterpret_cast<const T*>(from)[e];
        }
    }
}

template <class T, Contiguous LEFT, Contiguous RIGHT>
__global__ void __launch_bounds__(THREADS, REGISTER_BLOCKS) two_products_kernel(
    const Factors<T, LEFT, RIGHT> factors, const Work<T> work
) {
    extern __shared__ __align__(16) uint8_t shared[];
    const uint32_t stages = shared_address(shared);
    const Schedule& schedule = work.schedule;
    const int item = blockIdx.x;
    const Tile tile = work.tile(schedule.tile(item));
    const int row = tile.row * TILE, column = tile.column * TILE;
    Sums<T> sums;
    sums.clear();
    sums.multiply(
        stages, factors.first_left, factors.first_right, row, column, schedule.first_block(item), schedule.count(item)
    );
    if (schedule.is_part(item)) {
        write_part(work.parts, sums, item - schedule.whole);
        return;
    }
    finish_first(work, sums, row + row_of_sum(threadIdx.x), column + column_of_sum(threadIdx.x));
    if (work.blocks) sums.multiply(stages, factors.left, factors.right, row, column, 0, work.blocks);
    const int warp = threadIdx.x / 32;
    uint8_t* own = shared + warp * WARP_TILE * WARP_TILE * sizeof(T);
    write_out(work, sums, own, row + warp / 2 * WARP_TILE, column + warp % 2 * WARP_TILE);
}

// Blocks: (cut tile, m). Threads: as those that multiplied.
template <class T>
__global__ void __launch_bounds__(THREADS) add_parts_kernel(const Work<T> work) {
    const Tile tile = work.tile(work.schedule.whole + blockIdx.x);
    const int64_t i = tile.row * TILE + row_of_sum(threadIdx.x) + blockIdx.y * 16;
    const int64_t j = tile.column * TILE + column_of_sum(threadIdx.x);
#pragma unroll
    for (int n = 0; n < SUMS_RIGHT; ++n) {
        if (j + 8 * n >= work.columns) continue;
        const float4 sum = add_parts(work.parts, blockIdx.x, work.schedule.parts, blockIdx.y * SUMS_RIGHT + n);
        work.write(i, j + 8 * n, sum.x, sum.y);
        work.write(i + 8, j + 8 * n, sum.z, sum.w);
    }
}

struct Plan {
    int tiles_down, tiles_right;
    Schedule schedule;

    Plan(const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device) {
        tiles_down = ceil_div(out.rows, TILE);
        tiles_right = ceil_div(out.columns, TILE);
        const int tiles = tiles_down * tiles_right;
        schedule = P ? whole_tiles(tiles, ceil_div(P->columns, BLOCK))
                     : cut_last_wave(tiles, ceil_div(L.columns, BLOCK), blocks_at_once(device));
    }

    int64_t part_bytes() const { return schedule.cut() * schedule.parts * PART_BYTES; }
};

// A left factor (m, k), or a right one (k, n) passed as its transpose.
template <class T, Contiguous CONTIGUOUS>
Factor<T, CONTIGUOUS> factor(const kore_matrix& m) {
    const int64_t stride = CONTIGUOUS == Contiguous::OWN ? m.stride_column : m.stride_row;
    return {static_cast<const T*>(m.data), stride, int(m.rows), int(m.columns)};
}

template <class T, Contiguous LEFT, Contiguous RIGHT>
void launch(const ProductsCall& call, const Plan& plan, Status& status) {
    const kore_matrix& out = call.out;
    const Schedule& schedule = plan.schedule;
    Factors<T, LEFT, RIGHT> factors{};
    factors.first_left = factor<T, LEFT>(call.P ? *call.P : call.L);
    factors.first_right = factor<T, RIGHT>(transposed(call.P ? *call.Q : call.R));
    if (call.P) {
        factors.left = factor<T, LEFT>(call.L);
        factors.right = factor<T, RIGHT>(transposed(call.R));
    }
    Work<T> work{};
    work.rows = out.rows;
    work.columns = out.columns;
    work.valid = call.R.columns;
    work.tiles_down = plan.tiles_down;
    work.tiles_right = plan.tiles_right;
    work.schedule = schedule;
    work.blocks = call.P ? ceil_div(call.L.columns, BLOCK) : 0;
    work.scaling = call.scaling;
    work.bias = static_cast<const T*>(call.bias);
    if (call.add) {
        work.add = static_cast<const T*>(call.add->data);
        work.stride_add = call.add->stride_row;
    }
    work.out = static_cast<T*>(const_cast<void*>(out.data));
    work.stride_out = out.stride_row;
    work.parts = static_cast<float4*>(call.workspace);
    two_products_kernel<T, LEFT, RIGHT><<<schedule.items(), THREADS, SHARED_BYTES, call.stream>>>(factors, work);
    status.check(cudaGetLastError());
    if (!status.ok() || schedule.cut() == 0) return;
    add_parts_kernel<T><<<dim3(schedule.cut(), SUMS_DOWN), THREADS, 0, call.stream>>>(work);
    status.check(cudaGetLastError());
}

template <class T>
void launch(const ProductsCall& call, const Plan& plan, Status& status) {
    if (call.left == Contiguous::OWN)
        launch<T, Contiguous::OWN, Contiguous::OWN>(call, plan, status);
    else if (call.right == Contiguous::OWN)
        launch<T, Contiguous::SUMMED, Contiguous::OWN>(call, plan, status);
    else
        launch<T, Contiguous::SUMMED, Contiguous::SUMMED>(call, plan, status);
}

}  // namespace

int64_t products_workspace(const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device) {
    return Plan(out, L, P, device).part_bytes();
}

void two_products(const ProductsCall& call, const Device& device, Status& status) {
    const Plan plan(call.out, call.L, call.P, device);
    if (call.dtype == KORE_BFLOAT16)
        launch<__nv_bfloat16>(call, plan, status);
    else
        launch<__half>(call, plan, status);
}

}  // namespace kore::ampere
