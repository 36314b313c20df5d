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
#include "hopper_wgmma.cuh"

namespace kore {

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
    static constexpr int SHARE = N / CLUSTER, SHARE_BYTES = RIGHT_BYTES / CLUSTER;
    static constexpr int LEFT_STEP = LEFT == Contiguous::SUMMED ? 32 : 16 * 128;  // bytes to the next 16 steps
    static constexpr int RIGHT_STEP = RIGHT == Contiguous::SUMMED ? 32 : 16 * 128;
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
        for (int end = block + blocks; block < end; ++block, advance()) {
            const uint32_t to = prepare(STAGE_BYTES);
            copy_rows(left, to, row, block * BLOCK);
            const uint32_t share = to + LEFT_BYTES + rank * SHARE_BYTES;
            copy_share<true>(right, share, column + rank * SHARE, block * BLOCK);
        }
    }

    // The same for blocks of the cluster that have nothing in common: each copies the whole of its right factor, whose
    // halves begin at two columns. A negative row: there is no left factor.
    __device__ void copy_alone(
        const CUtensorMap& left, const CUtensorMap& right, int row, int column, int other, int block, int blocks
    ) {
        for (int end = block + blocks; block < end; ++block, advance()) {
            const uint32_t to = prepare(row < 0 ? RIGHT_BYTES : STAGE_BYTES);
            if (row >= 0) copy_rows(left, to, row, block * BLOCK);
            copy_share<false>(right, to + LEFT_BYTES, column, block * BLOCK);
            copy_share<false>(right, to + LEFT_BYTES + SHARE_BYTES, other, block * BLOCK);
        }
    }

    // For multiplying warpgroup `group`: sum = or += the product of the next blocks, at least one.
    __device__ void multiply(float (&sum)[N / 2], int group, int blocks, bool add) {
        pipelined(blocks, add, [&](bool add) { issue(sum, group, add); });
        complete(sum);
    }

    // The product of each half of the right factor with itself: warpgroup `group` takes its half, 64 rows of the product
    // in `upper` and 64 in `lower`.
    __device__ void multiply_halves(float (&upper)[N / 4], float (&lower)[N / 4], int group, int blocks) {
        pipelined(blocks, false, [&](bool add) { issue_halves(upper, lower, group, add); });
        complete(upper);
        complete(lower);
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

    // Where the next stage lies, once it is empty; so many bytes will be copied there.
    __device__ uint32_t prepare(int bytes) const {
        barrier_wait(empty(stage), phase ^ 1);
        barrier_expect(full(stage), bytes);
        return base + stage * STAGE_BYTES;
    }

    __device__ void copy_rows(const CUtensorMap& left, uint32_t to, int row, int step) const {
        if constexpr (LEFT == Contiguous::SUMMED) {
            copy_in(left, to, full(stage), step, row);
        } else {
#pragma unroll
            for (int i = 0; i < ROWS / 64; ++i) copy_in(left, to + i * CHUNK_BYTES, full(stage), row + i * 64, step);
        }
    }

    // A half of the columns of the right factor, to this block or to all of the cluster.
    template <bool TO_ALL>
    __device__ void copy_share(const CUtensorMap& right, uint32_t to, int column, int step) const {
        constexpr uint16_t ALL = (1 << CLUSTER) - 1;
        constexpr int BOXES = RIGHT == Contiguous::SUMMED ? 1 : SHARE / 64;
#pragma unroll
        for (int i = 0; i < BOXES; ++i) {
            const int x = RIGHT == Contiguous::SUMMED ? step : column + i * 64;
            const int y = RIGHT == Contiguous::SUMMED ? column : step;
            if constexpr (TO_ALL)
                copy_in(right, to + i * CHUNK_BYTES, full(stage), x, y, ALL);
            else
                copy_in(right, to + i * CHUNK_BYTES, full(stage), x, y);
        }
    }

    // While the tensor cores work on a stage, the next one is started; only then is the older one given back.
    template <class Issue>
    __device__ void pipelined(int blocks, bool add, Issue issue) {
        issue(add);
        for (int block = 1; block < blocks; ++block) {
            const int last = stage;
            advance();
            issue(true);
            wgmma_wait<1>();
            release(last);
        }
        wgmma_wait<0>();
        release(stage);
        advance();
    }

    // Sums must not be read before the wait for them, which does not mention them.
    template <int COUNT>
    static __device__ void complete(float (&sum)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sum[i])::"memory");
    }

    // Starts the product of a stage that has arrived.
    __device__ void issue(float (&sum)[N / 2], int group, bool add) const {
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

    __device__ void issue_halves(float (&upper)[N / 4], float (&lower)[N / 4], int group, bool add) const {
        static_assert(LEFT == RIGHT && N / CLUSTER == ROWS, "the right factor serves as the left one");
        const uint32_t at = base + stage * STAGE_BYTES + LEFT_BYTES + group * SHARE_BYTES;
        const uint64_t right = descriptor(at), below = descriptor(at + CHUNK_BYTES);
        barrier_wait(full(stage), phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BLOCK / 16; ++i) {
            const int step = i * RIGHT_STEP >> 4;
            wgmma<T, int(LEFT), int(RIGHT)>(upper, right + step, right + step, add || i > 0);
            wgmma<T, int(LEFT), int(RIGHT)>(lower, below + step, right + step, add || i > 0);
        }
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

// Where the sums of a thread lie in its warpgroup's 64 x N tile: sum[4 j + 2 h + e] at sum_row() + 8 h,
// sum_column() + 8 j + e.
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
__device__ __forceinline__ void write_part(float4* parts, const float* sum, int part, uint32_t rank, int group, int j) {
    parts[part_offset<N>(part, rank, group, j)] = make_float4(sum[0], sum[1], sum[2], sum[3]);
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
