// Any processor: vectors of four floats, which SSE2 and NEON have.
#include "microkernel.h"

const kore::Kernel& kore::portable_kernel(kore_dtype dtype) { return float32_kernel<4, 4, 2>(dtype); }
