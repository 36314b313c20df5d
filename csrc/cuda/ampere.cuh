// The instructions of Ampere (sm_80), which every newer GPU has, that CUDA C++ has no name for.
#pragma once

#include "common.cuh"

namespace kore {

// 16 bytes to shared memory, of which the first `bytes` are read and the others become zero.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the newest PENDING groups of this thread's copies have arrived.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements, transposed if TRANSPOSED; lane l gives the address of row l % 8 of matrix
// l / 8 and receives elements 2 (l % 4) and the next one of row l / 4 of each.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
}

#define KORE_MMA(type)                                                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                         \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum (16 x 8) += a (16 x 16) b (16 x 8), a as load_matrices gives it for the quarters (rows, steps) (0, 0), (8, 0),
// (0, 8), (8, 8), b for the halves of the steps.
template <class T>
__device__ __forceinline__ void multiply_add(float* sum, const uint32_t* a, const uint32_t* b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        KORE_MMA("bf16");
    else
        KORE_MMA("f16");
}

#undef KORE_MMA

}  // namespace kore
