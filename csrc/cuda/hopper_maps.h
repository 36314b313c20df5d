// Descriptions of matrices for Hopper's copy engine.
#pragma once

#include <cuda.h>

#include "host.h"

namespace kore {

// Clusters of two blocks that run at the same time.
inline int clusters_of(const Device& device) { return device.processors / 2; }

// A matrix of `outer` rows of `inner` contiguous elements, read or written in boxes of box_outer rows of 128 bytes.
CUtensorMap tensor_map(
    Status& status, const void* data, int dtype, int64_t inner, int64_t outer, int64_t stride, int box_outer
);

}  // namespace kore
