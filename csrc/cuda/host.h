// What every launch needs: the device, descriptions of matrices for the copy engine, and statuses.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../kore.h"

namespace kore {

// The first failure of a sequence of calls.
class Status {
public:
    bool ok() const { return code == KORE_OK; }
    void check(cudaError_t error);  // kore_cuda_message tells it afterwards
    void require(bool condition, kore_status otherwise) {
        if (ok() && !condition) code = otherwise;
    }
    operator int() const { return code; }

private:
    int code = KORE_OK;
};

// Clusters of two blocks that run at the same time on the current device, or 0 if its instructions are not Hopper's.
int hopper_clusters(Status& status);

// Whether the copy engine can address rows `stride` elements apart: multiples of 16 bytes.
inline bool copyable(const void* data, int64_t stride, int element_bytes) {
    return (reinterpret_cast<uintptr_t>(data) | uint64_t(stride) * element_bytes) % 16 == 0;
}

// A matrix of `outer` rows of `inner` contiguous elements, read or written in boxes of box_outer rows of 128 bytes.
CUtensorMap tensor_map(
    Status& status, const void* data, int dtype, int64_t inner, int64_t outer, int64_t stride, int box_outer
);

}  // namespace kore
