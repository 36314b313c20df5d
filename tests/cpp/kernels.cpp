// The CPU kernels, every instruction set of this machine: known numbers, untouched neighbours, the same bits by threads.
#include <limits>
#include <string>

#include "reference.h"

using test::Input;

namespace {

int update(std::vector<float>& C, const Input& x, const uint8_t* mask, const float* weight, bool upper, int isa, int threads) {
    return kore_covariance_update(
        C.data(), x.columns, x.data(), x.rows, x.stride_row, x.stride_column, x.dtype, mask, weight, 0.5f, upper, isa,
        threads
    );
}

// Small integers are exact in every dtype and order.
void integers(int isa, int dtype, std::mt19937& random) {
    Input x(37, 45, 45, 1, dtype, random);
    for (int64_t i = 0; i < x.rows; ++i)
        for (int64_t j = 0; j < x.columns; ++j) x.set(i, j, float((i * 7 + j * 3) % 9 - 4));
    std::vector<float> C(45 * 45, 2);
    CHECK(update(C, x, nullptr, nullptr, false, isa, 1) == KORE_OK, "isa %d", isa);
    for (int64_t i = 0; i < 45; ++i)
        for (int64_t j = 0; j < 45; ++j) {
            double expected = 0;
            for (int64_t n = 0; n < x.rows; ++n) expected += x.get(n, i) * x.get(n, j);
            expected = j <= i ? 2 + 0.5 * expected : 2;
            CHECK(C[i * 45 + j] == expected, "isa %d dtype %d (%d, %d)", isa, dtype, int(i), int(j));
        }
}

// Rows that are left out may hold anything; weights may have any sign.
void masked(int isa, int dtype, bool upper, std::mt19937& random) {
    Input x(50, 33, 40, 1, dtype, random);
    std::vector<uint8_t> mask(50, 1);
    std::vector<float> weight(50, -0.75f);
    for (int64_t n = 0; n < 50; n += 3) {
        mask[n] = 0;
        x.set(n, n % 33, std::numeric_limits<float>::infinity());
    }
    const std::vector<float> before(33 * 33, 1);
    std::vector<float> C = before;
    CHECK(update(C, x, mask.data(), weight.data(), upper, isa, 2) == KORE_OK, "isa %d", isa);
    test::check_covariance(C, before, x, mask.data(), weight.data(), 0.5f, upper, "masked");
}

void threads(int isa, int dtype, std::mt19937& random) {
    const Input x(130, 333, 333, 1, dtype, random);
    std::vector<float> one(333 * 333), four = one;
    update(one, x, nullptr, nullptr, true, isa, 1);
    update(four, x, nullptr, nullptr, true, isa, 4);
    CHECK(!std::memcmp(one.data(), four.data(), one.size() * 4), "isa %d dtype %d: threads change the bits", isa, dtype);
    test::check_covariance(one, std::vector<float>(333 * 333), x, nullptr, nullptr, 0.5f, true, "threads");
}

// The vectors that the generator's authors publish: of a counter and a key of zeros.
void philox() {
    const uint32_t published[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    for (int word = 0; word < 4; ++word) {
        const int64_t value = published[word] >> 1;
        CHECK(test::kept(0, word, 0, value) && !test::kept(0, word, 0, value + 1), "word %d", word);
        for (int isa = 0; isa <= kore_cpu_isa(); ++isa) {
            float x[4] = {1, 1, 1, 1}, at[4], above[4];
            kore_dropout(x, 1, 4, 4, 1, 4, 0, 0, value, at, isa, 1);
            kore_dropout(x, 1, 4, 4, 1, 4, 0, 0, value + 1, above, isa, 1);
            CHECK(at[word] == 1 && above[word] == 0, "isa %d word %d", isa, word);
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    for (int isa = 0; isa <= kore_cpu_isa(); ++isa)
        for (int dtype : {KORE_FLOAT32, KORE_BFLOAT16, KORE_FLOAT16}) {
            integers(isa, dtype, random);
            masked(isa, dtype, false, random);
            masked(isa, dtype, true, random);
            threads(isa, dtype, random);
        }
    philox();
    return test::finish("kernels");
}
