// What the C functions and the launches of both generations share: the device, calls and statuses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kore.h"
#include "common.cuh"

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

// The current device, and whose kernels it runs; NONE if it or this build has none.
struct Device {
    enum Kernels { NONE, AMPERE, HOPPER } kernels = NONE;
    int processors = 0;
    int shared_bytes = 0;  // of a processor

    explicit Device(Status& status);
};

// Whether the kernels can address rows `stride` elements apart: multiples of 16 bytes.
inline bool copyable(const void* data, int64_t stride, int element_bytes) {
    return (reinterpret_cast<uintptr_t>(data) | uint64_t(stride) * element_bytes) % 16 == 0;
}

inline kore_matrix transposed(const kore_matrix& m) {
    return {m.data, m.columns, m.rows, m.stride_column, m.stride_row};
}

// Calls whose arguments were checked.
struct CovarianceCall {
    float* C;
    int64_t d;
    const void* x;
    int64_t n, stride_row;
    int dtype;
    float alpha;
    const float* alpha_factor;
    bool upper;
    void* workspace;
    cudaStream_t stream;
};

struct ProductsCall {
    const kore_matrix &out, &L, &R;
    const void* bias;
    const kore_matrix *P, *Q, *add;
    float scaling;
    int dtype;
    Contiguous left, right;  // not SUMMED beside an OWN left one
    void* workspace;
    cudaStream_t stream;
};

namespace hopper {
int64_t covariance_workspace(int64_t n, int64_t d, const Device& device);
void covariance_update(const CovarianceCall& call, const Device& device, Status& status);
int64_t products_workspace(const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device);
void two_products(const ProductsCall& call, const Device& device, Status& status);
}  // namespace hopper

namespace ampere {
int64_t covariance_workspace(int64_t n, int64_t d, const Device& device);
void covariance_update(const CovarianceCall& call, const Device& device, Status& status);
int64_t products_workspace(const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device);
void two_products(const ProductsCall& call, const Device& device, Status& status);
}  // namespace ampere

}  // namespace kore
