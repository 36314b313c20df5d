// The Python module kore_kernels._native: the C ABI with addresses as integers. The GIL is released during every call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kore.h"

#ifdef KORE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

void check(int status) {
    if (status == KORE_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status != KORE_OK) throw std::invalid_argument(kore_message(status));
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void covariance_update(
    uintptr_t C,
    int64_t d,
    uintptr_t x,
    int64_t n,
    int64_t stride_row,
    int64_t stride_column,
    int dtype,
    uintptr_t mask,
    uintptr_t weight,
    float alpha,
    bool upper,
    int isa,
    int threads
) {
    check(kore_covariance_update(
        at<float>(C), d, at<void>(x), n, stride_row, stride_column, dtype, at<uint8_t>(mask), at<float>(weight), alpha,
        upper, isa, threads
    ));
}

void symmetrize(uintptr_t C, int64_t d, int element_bytes, bool upper, int threads) {
    check(kore_symmetrize(at<void>(C), d, element_bytes, upper, threads));
}

void dropout(
    uintptr_t x,
    int64_t rows,
    int64_t columns,
    int64_t stride_row,
    int64_t stride_column,
    int element_bytes,
    int64_t first_row,
    int64_t seed,
    int64_t threshold,
    uintptr_t out,
    int isa,
    int threads
) {
    check(kore_dropout(
        at<void>(x), rows, columns, stride_row, stride_column, element_bytes, first_row, seed, threshold, at<void>(out),
        isa, threads
    ));
}

#ifdef KORE_CUDA

// The runtime's own words for what went wrong, which the driver or the device decided.
void check_cuda(int status) {
    if (status == KORE_CUDA_ERROR) throw std::runtime_error(kore_cuda_message());
    check(status);
}

// Why no GPU can be used, or nothing.
std::string cuda_missing() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    cudaGetLastError();  // or the next call would report it again
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// The newest CUDA that the driver knows, as CUDART_VERSION writes it; 0 without a driver.
int cuda_driver() {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
}

void cuda_covariance_update(
    uintptr_t C,
    int64_t d,
    uintptr_t x,
    int64_t n,
    int64_t stride_row,
    int dtype,
    float alpha,
    uintptr_t alpha_factor,
    bool upper,
    uintptr_t workspace,
    int64_t workspace_bytes,
    uintptr_t stream
) {
    check_cuda(kore_cuda_covariance_update(
        at<float>(C), d, at<void>(x), n, stride_row, dtype, alpha, at<float>(alpha_factor), upper, at<void>(workspace),
        workspace_bytes, at<void>(stream)
    ));
}

// (address, rows, columns, stride_row, stride_column)
using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;

kore_matrix matrix(const Matrix& given) {
    const auto [data, rows, columns, stride_row, stride_column] = given;
    return {at<void>(data), rows, columns, stride_row, stride_column};
}

// The address of a matrix that may be missing, for the duration of a call.
class Optional {
public:
    explicit Optional(const std::optional<Matrix>& given) : present(given), value(given ? matrix(*given) : kore_matrix{}) {}
    operator const kore_matrix*() const { return present ? &value : nullptr; }

private:
    bool present;
    kore_matrix value;
};

int64_t cuda_two_products_workspace(const Matrix& out, const Matrix& L, const std::optional<Matrix>& P) {
    const kore_matrix result = matrix(out), left = matrix(L);
    return kore_cuda_two_products_workspace(&result, &left, Optional(P));
}

void cuda_two_products(
    const Matrix& out,
    const Matrix& L,
    const Matrix& R,
    uintptr_t bias,
    const std::optional<Matrix>& P,
    const std::optional<Matrix>& Q,
    float scaling,
    const std::optional<Matrix>& add,
    int dtype,
    uintptr_t workspace,
    int64_t workspace_bytes,
    uintptr_t stream
) {
    const kore_matrix result = matrix(out), left = matrix(L), right = matrix(R);
    check_cuda(kore_cuda_two_products(
        &result, &left, &right, at<void>(bias), Optional(P), Optional(Q), scaling, Optional(add), dtype,
        at<void>(workspace), workspace_bytes, at<void>(stream)
    ));
}

#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
    using release = py::call_guard<py::gil_scoped_release>;
    module.attr("ABI_VERSION") = KORE_ABI_VERSION;
    module.def("cpu_isa", &kore_cpu_isa, release());
    module.def("covariance_update", &covariance_update, release());
    module.def("symmetrize", &symmetrize, release());
    module.def("dropout", &dropout, release());
#ifdef KORE_CUDA
    module.attr("CUDA_VERSION") = CUDART_VERSION;
    module.attr("CUDA_ARCHS") = KORE_CUDA_ARCHS;
    module.def("cuda_missing", &cuda_missing, release());
    module.def("cuda_driver", &cuda_driver, release());
    module.def("cuda_covariance_workspace", &kore_cuda_covariance_workspace, release());
    module.def("cuda_covariance_update", &cuda_covariance_update, release());
    module.def("cuda_two_products_workspace", &cuda_two_products_workspace, release());
    module.def("cuda_two_products", &cuda_two_products, release());
#endif
}
