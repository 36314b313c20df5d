// The C functions of the covariance update on GPUs: what is checked, and whose kernels run.
#include "host.h"

namespace kore {
namespace {

int64_t workspace(int64_t n, int64_t d, const Device& device) {
#ifdef KORE_HOPPER
    if (device.kernels == Device::HOPPER) return hopper::covariance_workspace(n, d, device);
#endif
#ifdef KORE_AMPERE
    if (device.kernels == Device::AMPERE) return ampere::covariance_workspace(n, d, device);
#endif
    return 0;
}

}  // namespace
}  // namespace kore

int64_t kore_cuda_covariance_workspace(int64_t n, int64_t d) {
    using namespace kore;
    Status status;
    const Device device(status);
    return n > 0 && d > 0 ? workspace(n, d, device) : 0;
}

int kore_cuda_covariance_update(
    float* C,
    int64_t d,
    const void* x,
    int64_t n,
    int64_t stride_row,
    int dtype,
    float alpha,
    const float* alpha_factor,
    int upper,
    void* space,
    int64_t space_bytes,
    void* stream
) {
    using namespace kore;
    constexpr int64_t LIMIT = int64_t(1) << 30;
    Status status;
    status.require(d >= 0 && n >= 0 && d < LIMIT && n < LIMIT, KORE_INVALID_ARGUMENT);
    status.require(dtype == KORE_BFLOAT16 || dtype == KORE_FLOAT16, KORE_UNSUPPORTED);
    if (!status.ok() || d == 0 || n == 0) return status;
    status.require(stride_row >= d && copyable(x, stride_row, 2), KORE_UNSUPPORTED);
    const Device device(status);
    status.require(device.kernels != Device::NONE, KORE_UNSUPPORTED);
    if (!status.ok()) return status;
    status.require(space_bytes >= workspace(n, d, device), KORE_INVALID_ARGUMENT);
    if (!status.ok()) return status;
    const CovarianceCall call{C,     d,            x,          n,     stride_row, dtype,
                              alpha, alpha_factor, upper != 0, space, static_cast<cudaStream_t>(stream)};
#ifdef KORE_HOPPER
    if (device.kernels == Device::HOPPER) hopper::covariance_update(call, device, status);
#endif
#ifdef KORE_AMPERE
    if (device.kernels == Device::AMPERE) ampere::covariance_update(call, device, status);
#endif
    return status;
}
