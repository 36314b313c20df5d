#include "host.h"

#include <cstdlib>
#include <cstring>

namespace kore {

static thread_local cudaError_t latest = cudaSuccess;

void Status::check(cudaError_t error) {
    if (!ok() || error == cudaSuccess) return;
    code = KORE_CUDA_ERROR;
    latest = error;
    cudaGetLastError();  // or the next call would report it again
}

// KORE_CUDA_KERNELS=sm80 in the environment, read once: the kernels of 8.0 on 9.0 too.
static bool ampere_wanted() {
    static const char* setting = std::getenv("KORE_CUDA_KERNELS");
    return setting && std::strcmp(setting, "sm80") == 0;
}

Device::Device(Status& status) {
    int device = 0, major = 0;
    status.check(cudaGetDevice(&device));
    status.check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    status.check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    status.check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    if (!status.ok()) return;
#ifdef KORE_AMPERE
    if (major >= 8) kernels = AMPERE;
#endif
#ifdef KORE_HOPPER
    if (major == 9 && !(kernels == AMPERE && ampere_wanted())) kernels = HOPPER;
#endif
}

}  // namespace kore

const char* kore_cuda_message(void) { return cudaGetErrorString(kore::latest); }
