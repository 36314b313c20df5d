// out = L R + bias + scaling P Q + add on Hopper, in one pass over out.
//
// The low-rank product comes first: when it is complete, the sums in the registers are scaled, bias and add are added,
// and the other product continues on them. Without P and Q, that happens to the only product. Results leave through
// shared memory and the copy engine while the next tile is multiplied.
//
// A single product of few tiles, such as a gradient of B, is cut along its summed dimension; a second kernel adds the
// parts in order.
#include "hopper_mainloop.cuh"
#include "hopper_maps.h"
#include "products.cuh"

namespace kore {
namespace {

constexpr int WIDE = 256, NARROW = 128;  // columns of a tile

struct Maps {
    CUtensorMap first_left, first_right;  // the scaled product
    CUtensorMap left, right;              // the other one, if there is one
    CUtensorMap out;
};

template <class T, Contiguous LEFT, Contiguous RIGHT, int N>
__global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) two_products_kernel(
    const __grid_constant__ Maps maps, const __grid_constant__ Work<T> work
) {
    extern __shared__ uint8_t shared[];
    Mainloop<T, LEFT, RIGHT, N> pipeline(shared);
    const Schedule& schedule = work.schedule;
    const int group = warpgroup(), cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    if (group == MULTIPLIERS) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x == MULTIPLIERS * WARPGROUP) {
            for (int item = cluster; item < schedule.items(); item += clusters) {
                const Tile tile = work.tile(schedule.tile(item));
                const int row = tile.row * TILE_ROWS + pipeline.rank * ROWS, column = tile.column * N;
                pipeline.copy(
                    maps.first_left, maps.first_right, row, column, schedule.first_block(item), schedule.count(item)
                );
                pipeline.copy(maps.left, maps.right, row, column, 0, work.blocks);
            }
        }
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        float sum[N / 2];
        const bool first = threadIdx.x % WARPGROUP == 0;
        for (int item = cluster; item < schedule.items(); item += clusters) {
            const Tile tile = work.tile(schedule.tile(item));
            const int row = tile.row * TILE_ROWS + pipeline.rank * ROWS + group * 64, column = tile.column * N;
            if (schedule.is_part(item)) {
                pipeline.multiply(sum, group, schedule.count(item), false);
#pragma unroll
                for (int j = 0; j < N / 8; ++j)
                    write_part<N>(work.parts, sum + 4 * j, item - schedule.whole, pipeline.rank, group, j);
                continue;
            }
            uint32_t bias[N / 8] = {};  // loaded before it is needed
            if (work.bias) {
#pragma unroll
                for (int j = 0; j < N / 8; ++j) bias[j] = work.load(work.bias, column + sum_column() + j * 8);
            }
            pipeline.multiply(sum, group, schedule.count(item), false);
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                const float2 b = unpack<T>(bias[j]);
                sum[4 * j] = work.scaling * sum[4 * j] + b.x;
                sum[4 * j + 1] = work.scaling * sum[4 * j + 1] + b.y;
                sum[4 * j + 2] = work.scaling * sum[4 * j + 2] + b.x;
                sum[4 * j + 3] = work.scaling * sum[4 * j + 3] + b.y;
            }
            if (work.add) {
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    const float2 above = work.load_add(row + sum_row(), column + sum_column() + j * 8);
                    const float2 below = work.load_add(row + sum_row() + 8, column + sum_column() + j * 8);
                    sum[4 * j] += above.x;
                    sum[4 * j + 1] += above.y;
                    sum[4 * j + 2] += below.x;
                    sum[4 * j + 3] += below.y;
                }
            }
            if (work.blocks) pipeline.multiply(sum, group, work.blocks, true);
            if (column + N > work.valid) {
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    const int64_t at = column + sum_column() + j * 8;
                    if (at >= work.valid) sum[4 * j] = sum[4 * j + 2] = 0;
                    if (at + 1 >= work.valid) sum[4 * j + 1] = sum[4 * j + 3] = 0;
                }
            }
            const int lane = threadIdx.x % 32, r = threadIdx.x % WARPGROUP / 32 * 16 + lane % 16;
#pragma unroll
            for (int slice = 0; slice < N / 64; ++slice) {
                const uint32_t buffer = pipeline.staging(group, slice % STAGING);
                staging_acquire(group, first);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* s = sum + slice * 32 + j * 8;
                    const uint32_t piece = (j * 2 + lane / 16) ^ (r % 8);
                    store_matrices(
                        buffer + r * 128 + piece * 16, pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]),
                        pack<T>(s[6], s[7])
                    );
                }
                staging_filled(group);
                if (first) {
                    copy_out(maps.out, buffer, column + slice * 64, row);
                    copies_commit();
                }
            }
        }
        if (first) copies_done();
    }
    pipeline.finish();
}

constexpr int SLICE = 4;  // of the N / 8 groups of columns, for one block of add_parts_kernel

// Blocks: (cut tile and block of the cluster, slice). Threads: as those that multiplied.
template <class T, int N>
__global__ void __launch_bounds__(MULTIPLIERS * WARPGROUP) add_parts_kernel(const __grid_constant__ Work<T> work) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int cut = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, group = threadIdx.x / WARPGROUP;
    const Tile tile = work.tile(work.schedule.whole + cut);
    const int64_t i = tile.row * TILE_ROWS + rank * ROWS + group * 64 + sum_row();
#pragma unroll
    for (int k = 0; k < SLICE; ++k) {
        const int column_group = blockIdx.y * SLICE + k;
        const int64_t j = tile.column * N + column_group * 8 + sum_column();
        if (j >= work.columns) continue;
        const float4 sum = add_parts<N>(work.parts, cut, work.schedule.parts, rank, group, column_group);
        work.write(i, j, sum.x, sum.y);
        work.write(i + 8, j, sum.z, sum.w);
    }
}

struct Plan {
    int width;  // of a tile
    int tiles_down, tiles_right;
    int clusters;
    Schedule schedule;

    Plan(const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device) {
        clusters = clusters_of(device);
        tiles_down = ceil_div(out.rows, TILE_ROWS);
        width = tiles_down * ceil_div(out.columns, WIDE) < clusters || out.columns <= NARROW ? NARROW : WIDE;
        tiles_right = ceil_div(out.columns, width);
        const int tiles = tiles_down * tiles_right;
        schedule = P ? whole_tiles(tiles, ceil_div(P->columns, BLOCK))
                     : cut_last_wave(tiles, ceil_div(L.columns, BLOCK), clusters);
    }

    int64_t part_bytes() const {
        return int64_t(schedule.cut()) * schedule.parts * TILE_ROWS * width * sizeof(float);
    }
};

// The map of a left factor (m, k) for boxes of `own` rows, or of a right factor (k, n), passed as its transpose.
CUtensorMap factor_map(Status& status, const kore_matrix& factor, Contiguous contiguous, int dtype, int own) {
    if (contiguous == Contiguous::SUMMED)
        return tensor_map(status, factor.data, dtype, factor.columns, factor.rows, factor.stride_row, own);
    return tensor_map(status, factor.data, dtype, factor.rows, factor.columns, factor.stride_column, BLOCK);
}

template <class T, Contiguous LEFT, Contiguous RIGHT, int N>
void launch(const ProductsCall& call, const Plan& plan, Status& status) {
    constexpr auto kernel = two_products_kernel<T, LEFT, RIGHT, N>;
    constexpr int BYTES = Mainloop<T, LEFT, RIGHT, N>::SHARED_BYTES;
    const auto left = [&](const kore_matrix& m) { return factor_map(status, m, LEFT, call.dtype, ROWS); };
    const auto right = [&](const kore_matrix& m) {
        return factor_map(status, transposed(m), RIGHT, call.dtype, N / CLUSTER);
    };
    Maps maps{};
    maps.first_left = left(call.P ? *call.P : call.L);
    maps.first_right = right(call.P ? *call.Q : call.R);
    if (call.P) {
        maps.left = left(call.L);
        maps.right = right(call.R);
    }
    const kore_matrix& out = call.out;
    maps.out = tensor_map(status, out.data, call.dtype, out.columns, out.rows, out.stride_row, 64);
    Work<T> work{};
    work.rows = out.rows;
    work.columns = out.columns;
    work.valid = call.R.columns;
    work.tiles_down = plan.tiles_down;
    work.tiles_right = plan.tiles_right;
    work.schedule = plan.schedule;
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
    status.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    if (!status.ok()) return;
    const int blocks = smaller(plan.schedule.items(), plan.clusters) * CLUSTER;
    kernel<<<blocks, THREADS, BYTES, call.stream>>>(maps, work);
    status.check(cudaGetLastError());
    if (!status.ok() || plan.schedule.cut() == 0) return;
    cudaLaunchAttribute early{};  // may start while the first kernel ends; it waits for its results
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(plan.schedule.cut() * CLUSTER, N / 8 / SLICE);
    config.blockDim = MULTIPLIERS * WARPGROUP;
    config.stream = call.stream;
    config.attrs = &early;
    config.numAttrs = 1;
    status.check(cudaLaunchKernelEx(&config, add_parts_kernel<T, N>, work));
}

template <class T, Contiguous LEFT, Contiguous RIGHT>
void launch(const ProductsCall& call, const Plan& plan, Status& status) {
    if (plan.width == WIDE)
        launch<T, LEFT, RIGHT, WIDE>(call, plan, status);
    else
        launch<T, LEFT, RIGHT, NARROW>(call, plan, status);
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

int64_t hopper::products_workspace(
    const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device
) {
    return Plan(out, L, P, device).part_bytes();
}

void hopper::two_products(const ProductsCall& call, const Device& device, Status& status) {
    const Plan plan(call.out, call.L, call.P, device);
    if (call.dtype == KORE_BFLOAT16)
        launch<__nv_bfloat16>(call, plan, status);
    else
        launch<__half>(call, plan, status);
}

}  // namespace kore
