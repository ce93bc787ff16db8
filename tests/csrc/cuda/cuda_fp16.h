// Half precision as csrc/ uses it: conversions that round to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
    std::uint16_t bits;
};

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                       : exponent < 31  ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                       : mantissa == 0 ? INFINITY
                                        : NAN;
    return value.bits >> 15 != 0 ? -size : size;
}

inline __half __float2half_rn(float value) {
    const float size = std::fabs(value);
    int bits;
    if (size < 65520.0f) {
        const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
        // Rounded up to the next power of two, the mantissa carries into the exponent.
        bits = (exponent + 14) * 1024 + static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    } else {
        bits = value == value ? 0x7c00 : 0x7fff;
    }
    return {static_cast<std::uint16_t>(std::signbit(value) && value == value ? bits | 0x8000 : bits)};
}
