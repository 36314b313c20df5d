// Random calls of the C ABI beside a double reference: test_fuzz [calls] [seed].
//
// Every allocation ends with the last element that the call may touch, so that a build with KORE_SANITIZE=address sees
// the next one; large calls reach the code that runs in several threads.
#include <cstdlib>
#include <string>

#include "reference.h"

using test::Input;

namespace {

class Fuzz {
public:
    explicit Fuzz(unsigned seed) : random(seed) {}

    void call(int number) {
        context = "call " + std::to_string(number);
        switch (below(4)) {
            case 0:
                return symmetrize();
            case 1:
                return dropout();
            default:
                return covariance();
        }
    }

private:
    int64_t below(int64_t bound) { return int64_t(random() % bound); }
    bool coin() { return random() & 1; }

    int64_t dimension(int64_t large) {
        const int64_t sizes[] = {0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 95, 96, 97, below(130), below(130)};
        return below(12) ? sizes[below(16)] : large + below(40);
    }

    Input input(int64_t rows, int64_t columns, int dtype) {
        const int64_t gap = below(3), step = 1 + below(2);
        if (coin()) return Input(rows, columns, columns * step + gap, step, dtype, random);
        return Input(rows, columns, step, rows * step + gap, dtype, random);
    }

    void covariance() {
        const int64_t d = dimension(300), n = dimension(400);
        const Input x = input(n, d, int(below(3)));
        std::vector<uint8_t> mask(n);
        std::vector<float> weight(n), C(d * d);
        for (uint8_t& bit : mask) bit = coin() ? uint8_t(below(256)) : 0;
        std::normal_distribution<float> normal;
        for (float& value : weight) value = normal(random);
        for (float& value : C) value = normal(random);
        const bool masked = coin(), weighted = coin(), upper = coin();
        const float alpha = below(4) ? normal(random) : 1;
        const int isa = int(below(kore_cpu_isa() + 1)), threads = int(1 + below(4));
        const std::vector<float> before = C;
        const uint8_t* bits = masked ? mask.data() : nullptr;
        const float* weights = weighted ? weight.data() : nullptr;
        const int status = kore_covariance_update(
            C.data(), d, x.data(), n, x.stride_row, x.stride_column, x.dtype, bits, weights, alpha, upper, isa, threads
        );
        CHECK(status == KORE_OK, "%s: %s", context.c_str(), kore_message(status));
        const std::string what = context + " covariance d=" + std::to_string(d) + " n=" + std::to_string(n) + " dtype=" +
                                 std::to_string(x.dtype) + " isa=" + std::to_string(isa);
        test::check_covariance(C, before, x, bits, weights, alpha, upper, what.c_str());
    }

    void symmetrize() {
        const int64_t d = dimension(513);
        const int words = coin() ? 1 : 2;
        std::vector<uint32_t> C(d * d * words);
        for (uint32_t& value : C) value = random();
        const std::vector<uint32_t> before = C;
        const bool upper = coin();
        const int status = kore_symmetrize(C.data(), d, 4 * words, upper, int(1 + below(4)));
        CHECK(status == KORE_OK, "%s: %s", context.c_str(), kore_message(status));
        for (int64_t i = 0; i < d; ++i)
            for (int64_t j = 0; j < d; ++j) {
                const bool source = upper ? i <= j : i >= j;
                const int64_t from = source ? i * d + j : j * d + i;
                CHECK(!std::memcmp(&C[(i * d + j) * words], &before[from * words], 4 * words),
                      "%s symmetrize d=%d: (%d, %d)", context.c_str(), int(d), int(i), int(j));
            }
    }

    void dropout() {
        const int64_t rows = dimension(150), columns = dimension(600), first = below(1 << 20);
        const int64_t seed = int64_t(uint64_t(random()) << 32 | random()), threshold = below(int64_t(1) << 31);
        const int isa = int(below(kore_cpu_isa() + 1));
        const Input x = input(rows, columns, int(below(3)));
        const int size = x.size();
        std::vector<char> out(rows * columns * size, 1);
        const int status = kore_dropout(
            x.data(), rows, columns, x.stride_row, x.stride_column, size, first, seed, threshold, out.data(), isa,
            int(1 + below(4))
        );
        CHECK(status == KORE_OK, "%s: %s", context.c_str(), kore_message(status));
        const char* source = static_cast<const char*>(x.data());
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                char expected[4] = {};
                if (test::kept(first + i, j, seed, threshold))
                    std::memcpy(expected, source + (i * x.stride_row + j * x.stride_column) * size, size);
                CHECK(!std::memcmp(&out[(i * columns + j) * size], expected, size),
                      "%s dropout (%d, %d) isa=%d: (%d, %d)", context.c_str(), int(rows), int(columns), isa, int(i), int(j));
            }
    }

    std::mt19937 random;
    std::string context;
};

}  // namespace

int main(int count, char** arguments) {
    const int calls = count > 1 ? std::atoi(arguments[1]) : 1200;
    const unsigned seed = count > 2 ? unsigned(std::atoi(arguments[2])) : 1;
    Fuzz fuzz(seed);
    for (int number = 0; number < calls && !test::failures; ++number) fuzz.call(number);
    std::printf("%d calls, seed %u; ", calls, seed);
    return test::finish("fuzz");
}
