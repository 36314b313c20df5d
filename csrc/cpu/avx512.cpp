// AVX-512: 16 sums of 16 floats.
#include "microkernel.h"

const kore::Kernel& kore::avx512_kernel(kore_dtype dtype) { return float32_kernel<16, 8, 2>(dtype); }
