// The Python module kore_kernels._native: the C ABI with addresses as integers. The GIL is released during every call.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

#include "kore.h"

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

}  // namespace

PYBIND11_MODULE(_native, module) {
    using release = py::call_guard<py::gil_scoped_release>;
    module.attr("ABI_VERSION") = KORE_ABI_VERSION;
    module.def("cpu_isa", &kore_cpu_isa);
    module.def("covariance_update", &covariance_update, release());
    module.def("symmetrize", &symmetrize, release());
    module.def("dropout", &dropout, release());
}
