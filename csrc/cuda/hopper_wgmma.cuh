// The warpgroup product of Hopper's tensor cores: d += a b for a 64 x N tile in the registers of 128 threads and 16 steps
// of the summed dimension, both factors in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace kore {

#define KORE_D8(i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),   \
        "+f"(d[i + 7])

#define KORE_WGMMA_128(type)                                                                                    \
    asm volatile(                                                                                               \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                            \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                        \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
        "%64, %65, p, 1, 1, %67, %68;\n}\n"                                                                     \
        : KORE_D8(0), KORE_D8(8), KORE_D8(16), KORE_D8(24), KORE_D8(32), KORE_D8(40),                           \
          KORE_D8(48), KORE_D8(56)                                                                              \
        : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN))

#define KORE_WGMMA_256(type)                                                                                    \
    asm volatile(                                                                                               \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                           \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " "                                        \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                      \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                      \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                      \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "          \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "     \
        "%128, %129, p, 1, 1, %131, %132;\n}\n"                                                                 \
        : KORE_D8(0), KORE_D8(8), KORE_D8(16), KORE_D8(24), KORE_D8(32), KORE_D8(40),                           \
          KORE_D8(48), KORE_D8(56), KORE_D8(64), KORE_D8(72), KORE_D8(80), KORE_D8(88),                         \
          KORE_D8(96), KORE_D8(104), KORE_D8(112), KORE_D8(120)                                                 \
        : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN))

// A_MN, B_MN: 1 if the factor's own dimension, and not the summed one, is contiguous. accumulate 0: d = a b.
template <class T, int A_MN, int B_MN, int N>
__device__ __forceinline__ void wgmma(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
    static_assert(N == 64 || N == 128, "a tile of 128 or 256 columns");
    constexpr bool BF16 = std::is_same_v<T, __nv_bfloat16>;
    if constexpr (N == 64 && BF16) KORE_WGMMA_128("bf16");
    if constexpr (N == 64 && !BF16) KORE_WGMMA_128("f16");
    if constexpr (N == 128 && BF16) KORE_WGMMA_256("bf16");
    if constexpr (N == 128 && !BF16) KORE_WGMMA_256("f16");
}

#undef KORE_D8
#undef KORE_WGMMA_128
#undef KORE_WGMMA_256

}  // namespace kore
