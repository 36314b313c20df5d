#include "hopper_maps.h"

namespace kore {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that the library does not link to the driver.
static Encode encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<Encode>(function) : nullptr;
}

CUtensorMap tensor_map(
    Status& status, const void* data, int dtype, int64_t inner, int64_t outer, int64_t stride, int box_outer
) {
    static const Encode encode = encoder();
    CUtensorMap map{};
    if (!encode) status.check(cudaErrorSymbolNotFound);
    if (!status.ok()) return map;
    const int bytes = dtype == KORE_FLOAT32 ? 4 : 2;
    const CUtensorMapDataType type = dtype == KORE_FLOAT32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : dtype == KORE_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const cuuint64_t shape[2] = {cuuint64_t(inner), cuuint64_t(outer)};
    const cuuint64_t strides[1] = {cuuint64_t(stride) * bytes};
    const cuuint32_t box[2] = {cuuint32_t(128 / bytes), cuuint32_t(box_outer)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = encode(
        &map, type, 2, const_cast<void*>(data), shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    );
    if (result != CUDA_SUCCESS) status.check(cudaErrorInvalidValue);
    return map;
}

}  // namespace kore
