// The pipeline of every product on Hopper: tiles of two factors flow through shared memory to the tensor cores.
//
// A cluster of two blocks computes a tile of 256 x N, each block 128 rows of it. One warpgroup of a block only copies:
// the block's own rows of the left factor, and half of the columns of the right one, which it sends to both blocks. Two
// warpgroups multiply, 64 x N each, with the sums in registers. A stage of the pipeline holds BLOCK = 64 steps of the
// summed dimension.
//
// Shared memory has rows of 128 bytes whose 16-byte pieces are swizzled (piece p of row r lies at p ^ (r % 8)), which
// the copy engine writes and the tensor cores read. If the summed dimension of a factor is contiguous (SUMMED), a row
// is one row or column of the factor over the steps of the stage. If the other one is (OWN), a row is one step over 64
// rows or columns, and chunks of 64 follow each other.
#pragma once

#include "hopper.cuh"
#include "tiles.h"
#include "wgmma.cuh"

namespace kore {

enum class Contiguous { SUMMED = 0, OWN = 1 };

constexpr int BLOCK = 64;
constexpr int ROWS = 128;              // of a block of threads
constexpr int CLUSTER = 2;
constexpr int TILE_ROWS = CLUSTER * ROWS;
constexpr int WARPGROUP = 128;
constexpr int MULTIPLIERS = 2;         // warpgroups
constexpr int THREADS = (MULTIPLIERS + 1) * WARPGROUP;
constexpr int COPY_REGISTERS = 40, MULTIPLY_REGISTERS = 232;

constexpr int CHUNK_BYTES = 64 * 128;  // 64 rows of shared memory
constexpr int STAGING_BYTES = CHUNK_BYTES;
constexpr int STAGING = 2;             // buffers of a warpgroup, through which its results leave

template <class T, Contiguous LEFT, Contiguous RIGHT, int N>
class Mainloop {
    static constexpr int LEFT_BYTES = ROWS * BLOCK * sizeof(T), RIGHT_BYTES = N * BLOCK * sizeof(T);
    static constexpr int STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
    static constexpr int STAGES = N == 256 ? 4 : 6;
    static constexpr int BARRIERS = STAGES * STAGE_BYTES + MULTIPLIERS * STAGING * STAGING_BYTES;

public:
    static constexpr int SHARED_BYTES = BARRIERS + 2 * STAGES * sizeof(uint64_t) + 1024;  // the swizzle aligns to 1024

    // Whoever calls this in all threads may use the pipeline.
    __device__ explicit Mainloop(const void* shared) : base((shared_address(shared) + 1023) & ~1023u) {
        rank = cluster_rank();
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; ++i) {
                barrier_init(full(i), 1);
                barrier_init(empty(i), CLUSTER * MULTIPLIERS * WARPGROUP / 32);
            }
            barrier_init_fence();
        }
        cluster_sync();
    }

    // No block may leave while the other still writes to it.
    __device__ void finish() const {
        __syncwarp();
        cluster_sync();
    }

    // For one thread of the copying warpgroup: blocks of the factors' tiles that begin at this row and column.
    __device__ void copy(const CUtensorMap& left, const CUtensorMap& right, int row, int column, int block, int blocks) {
        constexpr uint16_t EVERYONE = (1 << CLUSTER) - 1;
        constexpr int SHARE = N / CLUSTER;
        const int first = column + rank * SHARE;
        for (int end = block + blocks; block < end; ++block, advance()) {
            const int step = block * BLOCK;
            const uint32_t to_left = base + stage * STAGE_BYTES;
            const uint32_t to_right = to_left + LEFT_BYTES + rank * (RIGHT_BYTES / CLUSTER);
            barrier_wait(empty(stage), phase ^ 1);
            barrier_expect(full(stage), STAGE_BYTES);
            if constexpr (LEFT == Contiguous::SUMMED) {
                copy_in(left, to_left, full(stage), step, row);
            } else {
#pragma unroll
                for (int i = 0; i < ROWS / 64; ++i)
                    copy_in(left, to_left + i * CHUNK_BYTES, full(stage), row + i * 64, step);
            }
            if constexpr (RIGHT == Contiguous::SUMMED) {
                copy_in(right, to_right, full(stage), step, first, EVERYONE);
            } else {
#pragma unroll
                for (int i = 0; i < SHARE / 64; ++i)
                    copy_in(right, to_right + i * CHUNK_BYTES, full(stage), first + i * 64, step, EVERYONE);
            }
        }
    }

    // For multiplying warpgroup `group`: sum = or += the product of the next blocks, at least one.
    __device__ void multiply(float (&sum)[N / 2], int group, int blocks, bool add) {
        issue(sum, group, add);
        for (int block = 1; block < blocks; ++block) {
            const int last = stage;
            advance();
            issue(sum, group, true);
            wgmma_wait<1>();
            release(last);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");
        release(stage);
        advance();
    }

    // Buffer `index` of a multiplying warpgroup for its results: 64 rows of 128 bytes.
    __device__ uint32_t staging(int group, int index) const {
        return base + STAGES * STAGE_BYTES + (group * STAGING + index) * STAGING_BYTES;
    }

    uint32_t rank;  // in the cluster

private:
    __device__ uint32_t full(int i) const { return base + BARRIERS + i * 8; }
    __device__ uint32_t empty(int i) const { return base + BARRIERS + (STAGES + i) * 8; }

    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }

    // Starts the product of a stage that has arrived.
    __device__ void issue(float (&sum)[N / 2], int group, bool add) const {
        constexpr int LEFT_STEP = LEFT == Contiguous::SUMMED ? 32 : 16 * 128;  // bytes to the next 16 steps
        constexpr int RIGHT_STEP = RIGHT == Contiguous::SUMMED ? 32 : 16 * 128;
        const uint32_t at_left = base + stage * STAGE_BYTES;
        const uint64_t left = descriptor(at_left + group * CHUNK_BYTES), right = descriptor(at_left + LEFT_BYTES);
        barrier_wait(full(stage), phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK / 16; ++i)
            wgmma<T, int(LEFT), int(RIGHT)>(
                sum, left + (i * LEFT_STEP >> 4), right + (i * RIGHT_STEP >> 4), add || i > 0
            );
        wgmma_commit();
    }

    // Every multiplying warp tells both copying ones.
    __device__ void release(int i) const {
        const uint32_t lane = threadIdx.x % 32;
        if (lane < CLUSTER) barrier_arrive(empty(i), lane);
    }

    // Eight rows of shared memory and the next eight are 1024 bytes apart, chunks of 64 rows CHUNK_BYTES. Bits 62-63
    // say that rows of 128 bytes are swizzled.
    static __device__ uint64_t descriptor(uint32_t address) {
        constexpr uint64_t LAYOUT = uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(CHUNK_BYTES >> 4) << 16;
        return LAYOUT | (address & 0x3FFFF) >> 4;
    }

    uint32_t base;
    int stage = 0;
    uint32_t phase = 0;
};

// Where the sums of a thread lie in its warpgroup's 64 x N tile: sum[4 j + 2 h + e] at row() + 8 h, column() + 8 j + e.
__device__ __forceinline__ int sum_row() { return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int sum_column() { return threadIdx.x % 4 * 2; }

// A buffer to fill, once the copy engine has read what it held. `first` is the warpgroup's first thread.
__device__ __forceinline__ void staging_acquire(int group, bool first) {
    if (first) copies_read<STAGING - 1>();
    warpgroup_sync(group + 1);
}

__device__ __forceinline__ void staging_filled(int group) {
    writes_visible_to_copies();
    warpgroup_sync(group + 1);
}

// ---- Parts of sums, as registers hold them: [tile][part][block of the cluster][warpgroup][j][thread]

template <int N>
constexpr int64_t PART_BYTES = int64_t(TILE_ROWS) * N * sizeof(float);

template <int N>
__device__ __forceinline__ int64_t part_offset(int part, uint32_t rank, int group, int j) {
    return (((int64_t(part) * CLUSTER + rank) * MULTIPLIERS + group) * (N / 8) + j) * WARPGROUP + threadIdx.x % WARPGROUP;
}

template <int N>
__device__ __forceinline__ void write_part(
    float4* parts, const float (&sum)[N / 2], int part, uint32_t rank, int group
) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
        parts[part_offset<N>(part, rank, group, j)] =
            make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
}

template <int N>
__device__ __forceinline__ float4 add_parts(const float4* parts, int tile, int count, uint32_t rank, int group, int j) {
    float4 total = make_float4(0, 0, 0, 0);
    for (int i = 0; i < count; ++i) {
        const float4 part = parts[part_offset<N>(tile * count + i, rank, group, j)];
        total.x += part.x;
        total.y += part.y;
        total.z += part.z;
        total.w += part.w;
    }
    return total;
}

}  // namespace kore
