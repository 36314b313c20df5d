// AVX2 and FMA: 12 of the 16 registers hold sums.
#include "microkernel.h"

const kore::Kernel& kore::avx2_kernel(kore_dtype dtype) { return float32_kernel<8, 4, 3>(dtype); }
