// AVX2 and FMA: 12 of the 16 registers hold sums.
#include "dropout.h"
#include "microkernel.h"

const kore::Kernel& kore::avx2_kernel(kore_dtype dtype) { return float32_kernel<8, 4, 3>(dtype); }

kore::DropRow kore::avx2_drop_row(int element_bytes) { return drop_row_of(element_bytes); }
