// What the C ABI refuses, with which status; and that it then writes nothing.
#include <cstdint>
#include <cstring>

#include "test.h"

namespace {

void refuses(int status, int expected, const char* what) {
    CHECK(status == expected, "%s: expected %d (%s), got %d (%s)", what, expected, kore_message(expected), status,
          kore_message(status));
}

int covariance(int64_t d, int64_t n, int dtype, int isa, int threads) {
    float C[4] = {7, 7, 7, 7}, x[4] = {1, 2, 3, 4};
    const int status = kore_covariance_update(C, d, x, n, 2, 1, dtype, nullptr, nullptr, 1, 0, isa, threads);
    for (float value : C) CHECK(status == KORE_OK || value == 7, "status %d, but C was written", status);
    return status;
}

int dropout(int64_t rows, int64_t columns, int bytes, int64_t first, int64_t threshold, int isa, int threads) {
    float x[4] = {1, 2, 3, 4}, out[4] = {7, 7, 7, 7};
    const int status =
        kore_dropout(x, rows, columns, 2, 1, bytes, first, 1, threshold, out, isa, threads);
    for (float value : out) CHECK(status == KORE_OK || value == 7, "status %d, but out was written", status);
    return status;
}

}  // namespace

int main() {
    const int best = kore_cpu_isa();
    CHECK(KORE_PORTABLE <= best && best <= KORE_AMX_BF16, "%d", best);

    refuses(covariance(2, 2, KORE_FLOAT32, 0, 1), KORE_OK, "covariance");
    refuses(covariance(0, 2, KORE_FLOAT32, 0, 1), KORE_OK, "covariance, d = 0");
    refuses(covariance(2, 0, KORE_FLOAT32, 0, 1), KORE_OK, "covariance, n = 0");
    refuses(covariance(-1, 2, KORE_FLOAT32, 0, 1), KORE_INVALID_ARGUMENT, "covariance, d = -1");
    refuses(covariance(2, -1, KORE_FLOAT32, 0, 1), KORE_INVALID_ARGUMENT, "covariance, n = -1");
    refuses(covariance(2, 2, -1, 0, 1), KORE_INVALID_ARGUMENT, "covariance, dtype -1");
    refuses(covariance(2, 2, 3, 0, 1), KORE_INVALID_ARGUMENT, "covariance, dtype 3");
    refuses(covariance(2, 2, KORE_FLOAT32, 0, 0), KORE_INVALID_ARGUMENT, "covariance, no thread");
    refuses(covariance(2, 2, KORE_FLOAT32, -1, 1), KORE_UNSUPPORTED_ISA, "covariance, isa -1");
    refuses(covariance(2, 2, KORE_FLOAT32, best + 1, 1), KORE_UNSUPPORTED_ISA, "covariance, isa above the best");

    float C[1] = {1};
    refuses(kore_symmetrize(C, 1, 4, 0, 1), KORE_OK, "symmetrize");
    refuses(kore_symmetrize(C, 0, 4, 0, 1), KORE_OK, "symmetrize, d = 0");
    refuses(kore_symmetrize(C, -1, 4, 0, 1), KORE_INVALID_ARGUMENT, "symmetrize, d = -1");
    refuses(kore_symmetrize(C, 1, 2, 0, 1), KORE_INVALID_ARGUMENT, "symmetrize, elements of 2 bytes");
    refuses(kore_symmetrize(C, 1, 4, 0, 0), KORE_INVALID_ARGUMENT, "symmetrize, no thread");

    refuses(dropout(2, 2, 4, 0, 0, 0, 1), KORE_OK, "dropout");
    refuses(dropout(-1, 2, 4, 0, 0, 0, 1), KORE_INVALID_ARGUMENT, "dropout, rows = -1");
    refuses(dropout(2, -1, 4, 0, 0, 0, 1), KORE_INVALID_ARGUMENT, "dropout, columns = -1");
    refuses(dropout(2, 2, 3, 0, 0, 0, 1), KORE_INVALID_ARGUMENT, "dropout, elements of 3 bytes");
    refuses(dropout(2, 2, 4, -1, 0, 0, 1), KORE_INVALID_ARGUMENT, "dropout, first row -1");
    refuses(dropout(2, 2, 4, 0, -1, 0, 1), KORE_INVALID_ARGUMENT, "dropout, threshold -1");
    refuses(dropout(2, 2, 4, 0, int64_t(1) << 31, 0, 1), KORE_INVALID_ARGUMENT, "dropout, threshold 2^31");
    refuses(dropout(2, 2, 4, 0, 0, best + 1, 1), KORE_UNSUPPORTED_ISA, "dropout, isa above the best");
    refuses(dropout(2, 2, 4, 0, 0, 0, 0), KORE_INVALID_ARGUMENT, "dropout, no thread");

    for (int status = KORE_OK; status <= KORE_CUDA_ERROR; ++status)
        for (int other = -1; other < status; ++other)
            CHECK(std::strcmp(kore_message(status), kore_message(other)), "%d and %d: one message", status, other);
    return test::finish("arguments");
}
