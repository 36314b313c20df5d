// One triangle of C += alpha x^T x on Hopper, for x (n, d) bfloat16 or float16.
//
// Clusters take squares of 256 x 256 of the triangle. Both factors are x itself, its own dimension contiguous. A square
// beside the diagonal is added to C by the copy engine, which needs no register while the next square is multiplied; on
// the diagonal every element is masked, so the other triangle is neither read nor written. Squares of the last, partial
// wave are cut along the rows of x; a second kernel adds their parts in order. Every element of C is added to once, so
// the bits repeat.
#include "host.h"
#include "mainloop.cuh"

namespace kore {
namespace {

constexpr int SQUARE = TILE_ROWS;
constexpr int GROUP = 4;  // rows of squares in a band

template <class T>
using Pipeline = Mainloop<T, Contiguous::OWN, Contiguous::OWN, SQUARE>;

struct Update {
    float* C;
    int64_t d;
    int squares;
    Schedule schedule;
    float alpha;
    const float* alpha_factor;
    bool upper;
    bool bulk;  // whether the copy engine can address C
    float4* parts;

    __device__ Tile square(int index) const {
        const Tile lower = tile_of_triangle(index, squares, GROUP);
        return upper ? Tile{lower.column, lower.row} : lower;
    }

    __device__ float scale() const { return alpha_factor ? alpha * *alpha_factor : alpha; }

    __device__ bool inside(int64_t i, int64_t j) const { return i < d && j < d && (upper ? i <= j : i >= j); }

    // C[i][j], C[i][j + 1] += a, b.
    __device__ void add(int64_t i, int64_t j, float a, float b) const {
        float* at = C + i * d + j;
        const bool first = inside(i, j), second = inside(i, j + 1);
        if (first && second && reinterpret_cast<uintptr_t>(at) % 8 == 0) {
            add_global(at, a, b);
        } else {
            if (first) add_global(at, a);
            if (second) add_global(at + 1, b);
        }
    }
};

template <class T>
__global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1) covariance_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap C, const Update update
) {
    extern __shared__ uint8_t shared[];
    Pipeline<T> pipeline(shared);
    const Schedule& schedule = update.schedule;
    const int group = warpgroup(), cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    if (group == MULTIPLIERS) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x == MULTIPLIERS * WARPGROUP) {
            for (int item = cluster; item < schedule.items(); item += clusters) {
                const Tile square = update.square(schedule.tile(item));
                const int row = square.row * SQUARE + pipeline.rank * ROWS;
                pipeline.copy(x, x, row, square.column * SQUARE, schedule.first_block(item), schedule.count(item));
            }
        }
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        float sum[SQUARE / 2];
        const float scale = update.scale();
        const bool first = threadIdx.x % WARPGROUP == 0;
        for (int item = cluster; item < schedule.items(); item += clusters) {
            const Tile square = update.square(schedule.tile(item));
            pipeline.multiply(sum, group, schedule.count(item), false);
            if (schedule.is_part(item)) {
                write_part<SQUARE>(update.parts, sum, item - schedule.whole, pipeline.rank, group);
                continue;
            }
            const int row = square.row * SQUARE + pipeline.rank * ROWS + group * 64, column = square.column * SQUARE;
            if (update.bulk && square.row != square.column) {
                const int r = sum_row(), c = sum_column();
#pragma unroll
                for (int slice = 0; slice < SQUARE / 32; ++slice) {
                    const uint32_t buffer = pipeline.staging(group, slice % STAGING);
                    staging_acquire(group, first);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float* s = sum + slice * 16 + j * 4;
                        const uint32_t piece = (j * 2 + c / 4) ^ (r % 8);
                        const uint32_t to = buffer + r * 128 + piece * 16 + c % 4 * 4;
                        store_shared(to, scale * s[0], scale * s[1]);
                        store_shared(to + 8 * 128, scale * s[2], scale * s[3]);
                    }
                    staging_filled(group);
                    if (first) {
                        add_out(C, buffer, column + slice * 32, row);
                        copies_commit();
                    }
                }
            } else {
                const int64_t i = row + sum_row(), j = column + sum_column();
#pragma unroll
                for (int k = 0; k < SQUARE / 8; ++k) {
                    update.add(i, j + k * 8, scale * sum[4 * k], scale * sum[4 * k + 1]);
                    update.add(i + 8, j + k * 8, scale * sum[4 * k + 2], scale * sum[4 * k + 3]);
                }
            }
        }
        if (first) copies_done();
    }
    pipeline.finish();
}

constexpr int SLICE = 4;  // of the SQUARE / 8 groups of columns, for one block of add_parts_kernel

// Blocks: (cut tile and block of the cluster, slice). Threads: as those that multiplied.
__global__ void __launch_bounds__(MULTIPLIERS * WARPGROUP) add_parts_kernel(const Update update) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int tile = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, group = threadIdx.x / WARPGROUP;
    const Tile square = update.square(update.schedule.whole + tile);
    const int64_t i = square.row * SQUARE + rank * ROWS + group * 64 + sum_row();
    const float scale = update.scale();
#pragma unroll
    for (int k = 0; k < SLICE; ++k) {
        const int column_group = blockIdx.y * SLICE + k;
        const int64_t j = square.column * SQUARE + column_group * 8 + sum_column();
        const float4 sum = add_parts<SQUARE>(update.parts, tile, update.schedule.parts, rank, group, column_group);
        update.add(i, j, scale * sum.x, scale * sum.y);
        update.add(i + 8, j, scale * sum.z, scale * sum.w);
    }
}

Schedule plan(int64_t n, int64_t d, int clusters) {
    const int squares = ceil_div(d, SQUARE);
    return cut_last_wave(squares * (squares + 1) / 2, ceil_div(n, BLOCK), clusters);
}

int64_t part_bytes(const Schedule& schedule) {
    return schedule.cut() * schedule.parts * PART_BYTES<SQUARE>;
}

template <class T>
void run(const CUtensorMap& x, const CUtensorMap& C, const Update& update, int clusters, cudaStream_t stream, Status& s) {
    constexpr int BYTES = Pipeline<T>::SHARED_BYTES;
    const Schedule& schedule = update.schedule;
    s.check(cudaFuncSetAttribute(covariance_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    if (!s.ok()) return;
    const int blocks = smaller(schedule.items(), clusters) * CLUSTER;
    covariance_kernel<T><<<blocks, THREADS, BYTES, stream>>>(x, C, update);
    s.check(cudaGetLastError());
    if (!s.ok() || schedule.cut() == 0) return;
    cudaLaunchAttribute early{};  // may start while the first kernel ends; it waits for its results
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(schedule.cut() * CLUSTER, SQUARE / 8 / SLICE);
    config.blockDim = MULTIPLIERS * WARPGROUP;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    s.check(cudaLaunchKernelEx(&config, add_parts_kernel, update));
}

}  // namespace
}  // namespace kore

int64_t kore_cuda_covariance_workspace(int64_t n, int64_t d) {
    using namespace kore;
    Status status;
    const int clusters = hopper_clusters(status);
    if (!clusters || n <= 0 || d <= 0) return 0;
    return part_bytes(plan(n, d, clusters));
}

int kore_cuda_covariance_update(
    float* C,
    int64_t d,
    const void* x,
    int64_t n,
    int64_t stride_row,
    int dtype,
    float alpha,
    const float* alpha_factor,
    int upper,
    void* workspace,
    int64_t workspace_bytes,
    void* stream
) {
    using namespace kore;
    constexpr int64_t LIMIT = int64_t(1) << 30;
    Status status;
    status.require(d >= 0 && n >= 0 && d < LIMIT && n < LIMIT, KORE_INVALID_ARGUMENT);
    status.require(dtype == KORE_BFLOAT16 || dtype == KORE_FLOAT16, KORE_UNSUPPORTED);
    if (!status.ok() || d == 0 || n == 0) return status;
    status.require(stride_row >= d && copyable(x, stride_row, 2), KORE_UNSUPPORTED);
    const int clusters = hopper_clusters(status);
    status.require(clusters > 0, KORE_UNSUPPORTED);
    if (!status.ok()) return status;
    Update update{C, d, ceil_div(d, SQUARE), plan(n, d, clusters), alpha, alpha_factor, upper != 0, copyable(C, d, 4)};
    update.parts = static_cast<float4*>(workspace);
    status.require(workspace_bytes >= part_bytes(update.schedule), KORE_INVALID_ARGUMENT);
#ifdef KORE_ADD_FROM_REGISTERS
    update.bulk = false;
#endif
    const CUtensorMap x_map = tensor_map(status, x, dtype, d, n, stride_row, 64);
    const CUtensorMap C_map = update.bulk ? tensor_map(status, C, KORE_FLOAT32, d, d, d, 64) : CUtensorMap{};
    if (!status.ok()) return status;
    const auto queue = static_cast<cudaStream_t>(stream);
    if (dtype == KORE_BFLOAT16)
        run<__nv_bfloat16>(x_map, C_map, update, clusters, queue, status);
    else
        run<__half>(x_map, C_map, update, clusters, queue, status);
    return status;
}
