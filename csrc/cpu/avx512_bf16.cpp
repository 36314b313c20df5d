// AVX512-BF16: vdpbf16ps adds two products of bfloat16 to a float32 sum. It reads subnormal inputs as zeros.
#include <immintrin.h>

#include "pairs.h"

namespace {

struct PairDot {
    using Scalar = int32_t;
    template <class Vector>
    static Vector add(Vector sum, int32_t a, Vector b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
};

}  // namespace

const kore::Kernel& kore::avx512_bf16_kernel() {
    static constexpr Kernel kernel = {
        8, 32, 2, 4, pack_pairs<32, 2>, pack_pairs<32, 2>, multiply<PairDot, 16, 8, 2>, multiply_half<PairDot, 16, 8, 2>(),
    };
    return kernel;
}
