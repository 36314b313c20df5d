// What the kernels of both generations use: pairs of elements, and addresses in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace kore {

// Which dimension of a factor of a product lies contiguous: the one that is summed, or its own.
enum class Contiguous { SUMMED = 0, OWN = 1 };

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    if constexpr (std::is_same_v<T, __half>)
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    else
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

}  // namespace kore
