// Any processor: vectors of four floats, which SSE2 and NEON have.
#include "dropout.h"
#include "microkernel.h"

const kore::Kernel& kore::portable_kernel(kore_dtype dtype) { return float32_kernel<4, 4, 2>(dtype); }

kore::DropRow kore::portable_drop_row(int element_bytes) { return drop_row_of(element_bytes); }
