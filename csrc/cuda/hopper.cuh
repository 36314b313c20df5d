// The instructions of Hopper (sm_90a) that CUDA C++ has no name for.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace kore {

// ---- Clusters and groups of threads

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The warpgroup of this thread, as a number that the compiler knows to be the same in the whole warp.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(~0u, int(threadIdx.x / 128), 0); }

// Barrier `id` (not 0, which is __syncthreads) of the 128 threads of a warpgroup.
__device__ __forceinline__ void warpgroup_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- mbarriers, by their address in shared memory

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces that so many bytes will be copied.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier that lies at the same address in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory"
    );
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t phase) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory"
    );
    return done;
}

// Waits until the phase of this parity is complete. With KORE_DEBUG_HANG, five seconds are an error.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
#ifdef KORE_DEBUG_HANG
    uint64_t start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    while (!barrier_try_wait(barrier, phase)) {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (now - start > 5000000000) __trap();
    }
#else
    while (!barrier_try_wait(barrier, phase)) {
    }
#endif
}

// ---- The copy engine (TMA)

// A box of a matrix to shared memory, zeros outside the matrix.
__device__ __forceinline__ void copy_in(const CUtensorMap& map, uint32_t to, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory"
    );
}

// The same to the blocks of the cluster in `mask`, each of which hears of it at its own barrier.
__device__ __forceinline__ void copy_in(
    const CUtensorMap& map, uint32_t to, uint32_t barrier, int x, int y, uint16_t mask
) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%3, %4}], [%2], %5;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(mask)
        : "memory"
    );
}

// A box from shared memory; what lies outside the matrix is left out.
__device__ __forceinline__ void copy_out(const CUtensorMap& map, uint32_t from, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from),
        "r"(x), "r"(y)
        : "memory"
    );
}

// The same, added to the matrix.
__device__ __forceinline__ void add_out(const CUtensorMap& map, uint32_t from, int x, int y) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(from), "r"(x), "r"(y)
        : "memory"
    );
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until shared memory has been read by all but the newest PENDING groups of this thread's copies.
template <int PENDING>
__device__ __forceinline__ void copies_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to the copy engine.
__device__ __forceinline__ void writes_visible_to_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Tensor cores (the product itself is in wgmma.cuh)

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ---- Single words

// Four 8 x 8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory"
    );
}

__device__ __forceinline__ void store_shared(uint32_t to, float a, float b) {
    asm volatile("st.shared::cta.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

// *to += value without waiting for the sum.
__device__ __forceinline__ void add_global(float* to, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

__device__ __forceinline__ void add_global(float* to, float a, float b) {
    asm volatile("red.relaxed.gpu.global.v2.f32.add [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
}

}  // namespace kore
