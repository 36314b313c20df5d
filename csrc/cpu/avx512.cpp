// AVX-512: 16 sums of 16 floats.
#include "dropout.h"
#include "microkernel.h"

const kore::Kernel& kore::avx512_kernel(kore_dtype dtype) { return float32_kernel<16, 8, 2>(dtype); }

kore::DropRow kore::avx512_drop_row(int element_bytes) { return drop_row_of(element_bytes); }
