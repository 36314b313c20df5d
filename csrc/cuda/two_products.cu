// The C functions of the two products on GPUs: what is checked, and whose kernels run.
#include "host.h"

namespace kore {
namespace {

int64_t workspace(const kore_matrix& out, const kore_matrix& L, const kore_matrix* P, const Device& device) {
#ifdef KORE_HOPPER
    if (device.kernels == Device::HOPPER) return hopper::products_workspace(out, L, P, device);
#endif
#ifdef KORE_AMPERE
    if (device.kernels == Device::AMPERE) return ampere::products_workspace(out, L, P, device);
#endif
    return 0;
}

constexpr int64_t LIMIT = int64_t(1) << 30;

bool sized(const kore_matrix& m) { return m.rows > 0 && m.columns > 0 && m.rows < LIMIT && m.columns < LIMIT; }

bool rows_copyable(const kore_matrix& m) {
    return m.stride_column == 1 && m.stride_row >= m.columns && copyable(m.data, m.stride_row, 2);
}

bool columns_copyable(const kore_matrix& m) { return rows_copyable(transposed(m)); }

// Which dimension of both factors is contiguous; of a left one, rows lie along the summed dimension.
bool majorness(const kore_matrix& m, const kore_matrix* other, bool rows_are_summed, Contiguous& result) {
    if (rows_copyable(m) && (!other || rows_copyable(*other)))
        result = rows_are_summed ? Contiguous::SUMMED : Contiguous::OWN;
    else if (columns_copyable(m) && (!other || columns_copyable(*other)))
        result = rows_are_summed ? Contiguous::OWN : Contiguous::SUMMED;
    else
        return false;
    return true;
}

}  // namespace
}  // namespace kore

int64_t kore_cuda_two_products_workspace(const kore_matrix* out, const kore_matrix* L, const kore_matrix* P) {
    using namespace kore;
    Status status;
    const Device device(status);
    if (!sized(*out) || !sized(*L) || (P && !sized(*P))) return 0;
    return workspace(*out, *L, P, device);
}

int kore_cuda_two_products(
    const kore_matrix* out,
    const kore_matrix* L,
    const kore_matrix* R,
    const void* bias,
    const kore_matrix* P,
    const kore_matrix* Q,
    float scaling,
    const kore_matrix* add,
    int dtype,
    void* space,
    int64_t space_bytes,
    void* stream
) {
    using namespace kore;
    Status status;
    status.require((P == nullptr) == (Q == nullptr), KORE_INVALID_ARGUMENT);
    status.require(L->rows == out->rows && R->columns <= out->columns, KORE_INVALID_ARGUMENT);
    status.require(!P || (P->rows == out->rows && Q->columns == R->columns), KORE_INVALID_ARGUMENT);
    status.require(!add || (add->rows == out->rows && add->columns == R->columns), KORE_INVALID_ARGUMENT);
    if (!status.ok() || out->rows == 0 || out->columns == 0) return status;
    status.require(dtype == KORE_BFLOAT16 || dtype == KORE_FLOAT16, KORE_UNSUPPORTED);
    status.require(sized(*out) && sized(*L) && sized(*R) && (!P || (sized(*P) && sized(*Q))), KORE_UNSUPPORTED);
    status.require(rows_copyable(*out) && (!add || rows_copyable(*add)), KORE_UNSUPPORTED);
    status.require(reinterpret_cast<uintptr_t>(bias) % 4 == 0, KORE_UNSUPPORTED);
    Contiguous left = Contiguous::SUMMED, right = Contiguous::SUMMED;
    status.require(majorness(*L, P, true, left) && majorness(*R, Q, false, right), KORE_UNSUPPORTED);
    status.require(left == Contiguous::SUMMED || right == Contiguous::OWN, KORE_UNSUPPORTED);
    const Device device(status);
    status.require(device.kernels != Device::NONE, KORE_UNSUPPORTED);
    if (!status.ok()) return status;
    status.require(space_bytes >= workspace(*out, *L, P, device), KORE_INVALID_ARGUMENT);
    if (!status.ok()) return status;
    const ProductsCall call{*out,  *L,   *R,   bias,  P,     Q,
                            add,   scaling, dtype, left, right, space, static_cast<cudaStream_t>(stream)};
#ifdef KORE_HOPPER
    if (device.kernels == Device::HOPPER) hopper::two_products(call, device, status);
#endif
#ifdef KORE_AMPERE
    if (device.kernels == Device::AMPERE) ampere::two_products(call, device, status);
#endif
    return status;
}
