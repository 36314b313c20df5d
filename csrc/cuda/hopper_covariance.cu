// One triangle of C += alpha x^T x on Hopper, for x (n, d) bfloat16 or float16.
//
// Clusters take squares of 256 x 256 of the triangle, or as much on the diagonal (Piece). Both factors are x itself, its
// own dimension contiguous. A square is added to C by the copy engine, which needs no register while the next square is
// multiplied; on the diagonal every element is masked, so the other triangle is neither read nor written. Pieces of the
// last, partial wave are cut along the rows of x; a second kernel adds their parts in order. Every element of C is added
// to once, so the bits repeat.
#include "hopper_mainloop.cuh"
#include "hopper_maps.h"
#include "triangle.cuh"

namespace kore {
namespace {

constexpr int CELL = ROWS, SQUARE = 2 * CELL;
constexpr int GROUP = 4;  // rows of squares in a band

template <class T>
using Pipeline = Mainloop<T, Contiguous::OWN, Contiguous::OWN, SQUARE>;

// Adds a and b to columns `column` and column + 1, as far as they lie in the triangle.
__device__ __forceinline__ void add(const Triangle::Row& row, int column, float a, float b) {
    const bool left = row.has(column), right = row.has(column + 1);
    if (left && right && row.pairs) {
        add_global(row.at + column, a, b);
    } else {
        if (left) add_global(row.at + column, a);
        if (right) add_global(row.at + column + 1, b);
    }
}

struct Update : Triangle {
    int squares;
    Schedule schedule;
    bool bulk;  // whether the copy engine can address C
    float4* parts;

    __device__ Piece piece(int item, int rank) const {
        return piece_of_triangle(schedule.tile(item), rank, squares, upper, GROUP);
    }

    // Adds this thread's sums of 64 x 2 COUNT elements that begin at (i, j).
    template <int COUNT>
    __device__ void add(int i, int j, const float (&sum)[COUNT], float scale) const {
        const Row above = row(i + sum_row(), j + sum_column()), below = row(i + sum_row() + 8, j + sum_column());
#pragma unroll
        for (int k = 0; k < COUNT / 4; ++k) {
            kore::add(above, 8 * k, scale * sum[4 * k], scale * sum[4 * k + 1]);
            kore::add(below, 8 * k, scale * sum[4 * k + 2], scale * sum[4 * k + 3]);
        }
    }

    // Leaves them in the workspace; `first` of COUNT / 4 groups of columns.
    template <int COUNT>
    __device__ void keep(int part, int rank, int group, int first, const float (&sum)[COUNT]) const {
#pragma unroll
        for (int k = 0; k < COUNT / 4; ++k) write_part<SQUARE>(parts, sum + 4 * k, part, rank, group, first + k);
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
                const Piece piece = update.piece(item, pipeline.rank);
                const int row = piece.row * CELL, column = piece.column * CELL;
                const int first = schedule.first_block(item), count = schedule.count(item);
                if (piece.kind == Piece::SQUARE)
                    pipeline.copy(x, x, row, column, first, count);
                else if (piece.kind == Piece::STRIP)
                    pipeline.copy_alone(x, x, row, column, column + CELL, first, count);
                else
                    pipeline.copy_alone(x, x, -1, column, piece.other * CELL, first, count);
            }
        }
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        const float scale = update.scale();
        const bool first = threadIdx.x % WARPGROUP == 0;
        for (int item = cluster; item < schedule.items(); item += clusters) {
            const Piece piece = update.piece(item, pipeline.rank);
            const int part = item - schedule.whole;
            if (piece.kind == Piece::CORNERS) {
                float upper[SQUARE / 4], lower[SQUARE / 4];
                pipeline.multiply_halves(upper, lower, group, schedule.count(item));
                if (part < 0) {
                    const int corner = (group ? piece.other : piece.column) * CELL;
                    update.add(corner, corner, upper, scale);
                    update.add(corner + 64, corner, lower, scale);
                } else {
                    update.keep(part, pipeline.rank, group, 0, upper);
                    update.keep(part, pipeline.rank, group, CELL / 8, lower);
                }
                continue;
            }
            float sum[SQUARE / 2];
            pipeline.multiply(sum, group, schedule.count(item), false);
            const int row = piece.row * CELL + group * 64, column = piece.column * CELL;
            if (part >= 0) {
                update.keep(part, pipeline.rank, group, 0, sum);
                continue;
            }
            if (!update.bulk || piece.kind != Piece::SQUARE) {
                update.add(row, column, sum, scale);
                continue;
            }
            const int r = sum_row(), c = sum_column();
#pragma unroll
            for (int slice = 0; slice < SQUARE / 32; ++slice) {
                const uint32_t buffer = pipeline.staging(group, slice % STAGING);
                staging_acquire(group, first);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* s = sum + slice * 16 + j * 4;
                    const uint32_t place = (j * 2 + c / 4) ^ (r % 8);
                    const uint32_t to = buffer + r * 128 + place * 16 + c % 4 * 4;
                    store_shared(to, scale * s[0], scale * s[1]);
                    store_shared(to + 8 * 128, scale * s[2], scale * s[3]);
                }
                staging_filled(group);
                if (first) {
                    add_out(C, buffer, column + slice * 32, row);
                    copies_commit();
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
    const Schedule& schedule = update.schedule;
    const Piece piece = update.piece(schedule.whole + tile * schedule.parts, rank);
    const float scale = update.scale();
#pragma unroll
    for (int k = 0; k < SLICE; ++k) {
        const int columns = blockIdx.y * SLICE + k;
        const float4 part = add_parts<SQUARE>(update.parts, tile, schedule.parts, rank, group, columns);
        const float sum[4] = {part.x, part.y, part.z, part.w};
        if (piece.kind == Piece::CORNERS) {
            const int corner = (group ? piece.other : piece.column) * CELL;
            update.add(corner + columns / (CELL / 8) * 64, corner + columns % (CELL / 8) * 8, sum, scale);
        } else {
            update.add(piece.row * CELL + group * 64, piece.column * CELL + columns * 8, sum, scale);
        }
    }
}

Schedule plan(int64_t n, int64_t d, int clusters) {
    return cut_last_wave(pieces_of_triangle(ceil_div(d, SQUARE)), ceil_div(n, BLOCK), clusters);
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

int64_t hopper::covariance_workspace(int64_t n, int64_t d, const Device& device) {
    return part_bytes(plan(n, d, clusters_of(device)));
}

void hopper::covariance_update(const CovarianceCall& call, const Device& device, Status& status) {
    const auto [C, d, x, n, stride_row, dtype, alpha, alpha_factor, upper, workspace, stream] = call;
    const int clusters = clusters_of(device);
    Update update{{C, d, alpha, alpha_factor, upper}, ceil_div(d, SQUARE), plan(n, d, clusters), copyable(C, d, 4)};
    update.parts = static_cast<float4*>(workspace);
#ifdef KORE_ADD_FROM_REGISTERS
    update.bulk = false;
#endif
    const CUtensorMap x_map = tensor_map(status, x, dtype, d, n, stride_row, 64);
    const CUtensorMap C_map = update.bulk ? tensor_map(status, C, KORE_FLOAT32, d, d, d, 64) : CUtensorMap{};
    if (!status.ok()) return;
    if (dtype == KORE_BFLOAT16)
        run<__nv_bfloat16>(x_map, C_map, update, clusters, stream, status);
    else
        run<__half>(x_map, C_map, update, clusters, stream, status);
}

}  // namespace kore
