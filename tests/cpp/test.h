// What the C++ tests share: a check that goes on after a failure, and exact copies of the two-byte dtypes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "kore.h"

namespace test {

inline int failures = 0;

#define CHECK(condition, ...)                                               \
    do {                                                                    \
        if (!(condition) && test::failures++ < 10) {                        \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);     \
            std::printf(__VA_ARGS__);                                       \
            std::printf("\n");                                              \
        }                                                                   \
    } while (0)

inline int finish(const char* what) {
    std::printf("%s: %s\n", what, failures ? "FAILED" : "passed");
    return failures ? 1 : 0;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t to_bfloat16(float value) { return uint16_t(bits_of(value) >> 16); }  // towards zero

inline float from_float16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -size : size;
}

// Towards zero; for values that float16 reaches.
inline uint16_t to_float16(float value) {
    const float size = std::fabs(value);
    int exponent = 0;
    std::frexp(size, &exponent);
    const int biased = size == 0 || exponent < -13 ? 0 : exponent + 14;
    const int fraction = int(std::ldexp(size, biased ? 25 - biased : 24)) & 1023;
    return uint16_t((value < 0) << 15 | biased << 10 | fraction);
}

}  // namespace test
