// The pipeline of every product on Ampere and newer: asynchronous copies fill a ring of stages in shared memory, and the
// warps of the block multiply the oldest one. A block computes a tile of 128 x 128.
#pragma once

#include "ampere.cuh"
#include "ampere_layout.h"
#include "host.h"

namespace kore::ampere {

// Blocks that run at the same time.
inline int blocks_at_once(const Device& device) {
    return device.processors * smaller(REGISTER_BLOCKS, device.shared_bytes / (SHARED_BYTES + 1024));
}

// A factor of a product: `own` rows of the left one or columns of the right one, `summed` steps; lines of contiguous
// elements are `stride` elements apart and begin at multiples of 16 bytes.
template <class T, Contiguous CONTIGUOUS>
struct Factor {
    static constexpr bool OWN = CONTIGUOUS == Contiguous::OWN;

    const T* data;
    int64_t stride;
    int own, summed;

    // Starts to copy a tile of it that begins at (first, step), zeros beyond its ends.
    __device__ void copy(uint32_t to, int first, int step) const {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const Place place = copied(OWN, threadIdx.x, i);
            const int o = first + place.own, s = step + place.step;
            const bool exists = OWN ? s < summed : o < own;
            const int bytes = exists ? OWN ? bytes_of_piece(o, own) : bytes_of_piece(s, summed) : 0;
            const T* from = data + (OWN ? s * stride + o : o * stride + s);
            copy_async(to + place.offset, bytes ? from : data, bytes);
        }
    }
};

template <class T>
struct Sums {
    float sum[SUMS_DOWN][SUMS_RIGHT][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < SUMS_DOWN * SUMS_RIGHT * 4; ++i) (&sum[0][0][0])[i] = 0;
    }

    // Adds the product of the tiles that begin at this row and column, over `blocks` blocks of steps. Shared memory is
    // free when it ends.
    template <Contiguous LEFT, Contiguous RIGHT>
    __device__ void multiply(
        uint32_t shared, const Factor<T, LEFT>& left, const Factor<T, RIGHT>& right, int row, int column, int block,
        int blocks
    ) {
        const auto start = [&](int i) {
            if (i < blocks) {
                const uint32_t to = shared + i % STAGES * STAGE_BYTES;
                left.copy(to, row, (block + i) * BLOCK);
                right.copy(to + FACTOR_BYTES, column, (block + i) * BLOCK);
            }
            copy_async_commit();
        };
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) start(i);
        for (int i = 0; i < blocks; ++i) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // this stage is there for all, and nobody reads the previous one any more
            start(i + STAGES - 1);
            multiply_stage<LEFT, RIGHT>(shared + i % STAGES * STAGE_BYTES);
        }
        copy_async_wait<0>();
        __syncthreads();
    }

private:
    template <Contiguous LEFT, Contiguous RIGHT>
    __device__ void multiply_stage(uint32_t at) {
        constexpr bool LEFT_OWN = LEFT == Contiguous::OWN, RIGHT_OWN = RIGHT == Contiguous::OWN;
#pragma unroll
        for (int step = 0; step < BLOCK; step += 16) {
            uint32_t a[SUMS_DOWN][4], b[SUMS_RIGHT / 2][4];
#pragma unroll
            for (int m = 0; m < SUMS_DOWN; ++m)
                load_matrices<LEFT_OWN>(a[m], at + left_row(LEFT_OWN, threadIdx.x, m, step));
#pragma unroll
            for (int n = 0; n < SUMS_RIGHT / 2; ++n)
                load_matrices<RIGHT_OWN>(b[n], at + FACTOR_BYTES + right_row(RIGHT_OWN, threadIdx.x, n, step));
#pragma unroll
            for (int m = 0; m < SUMS_DOWN; ++m)
#pragma unroll
                for (int n = 0; n < SUMS_RIGHT; ++n) multiply_add<T>(sum[m][n], a[m], b[n / 2] + n % 2 * 2);
        }
    }
};

// ---- Parts of sums, as registers hold them: [tile][part][m][n][thread]

constexpr int64_t PART_BYTES = int64_t(TILE) * TILE * sizeof(float);

__device__ __forceinline__ int64_t part_offset(int part, int group) {
    return (int64_t(part) * SUMS_DOWN * SUMS_RIGHT + group) * THREADS + threadIdx.x;
}

template <class T>
__device__ __forceinline__ void write_part(float4* parts, const Sums<T>& sums, int part) {
#pragma unroll
    for (int m = 0; m < SUMS_DOWN; ++m)
#pragma unroll
        for (int n = 0; n < SUMS_RIGHT; ++n) {
            const float* s = sums.sum[m][n];
            parts[part_offset(part, m * SUMS_RIGHT + n)] = make_float4(s[0], s[1], s[2], s[3]);
        }
}

__device__ __forceinline__ float4 add_parts(const float4* parts, int tile, int count, int group) {
    float4 total = make_float4(0, 0, 0, 0);
    for (int i = 0; i < count; ++i) {
        const float4 part = parts[part_offset(tile * count + i, group)];
        total.x += part.x;
        total.y += part.y;
        total.z += part.z;
        total.w += part.w;
    }
    return total;
}

}  // namespace kore::ampere
