// Stands in for CUDA's header of this name.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

// To nearest, ties to even; every NaN becomes CUDA's.
inline __half __float2half_rn(float value) {
    if (value != value) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t least_normal = 113u << 23;  // 2^-14
    if (magnitude < least_normal) {            // a multiple of 2^-24; the product is exact, nearbyint rounds it
        return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f)))};
    }
    const uint32_t rebased = magnitude - (112u << 23);  // float's exponent has bias 127, half's 15
    const uint32_t last_kept = rebased >> 13 & 1;
    const uint32_t rounded = (rebased + 0xfff + last_kept) >> 13;
    return {static_cast<uint16_t>(sign | std::min(rounded, 0x7c00u))};  // beyond the largest: infinity
}

inline float __half2float(__half value) {
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude < 0x400) {  // zero or subnormal
        const float small = static_cast<float>(magnitude) * 0x1p-24f;
        return value.bits & 0x8000 ? -small : small;
    }
    const uint32_t exponent_shift = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;  // infinity and NaN keep all bits set
    const uint32_t bits = ((magnitude << 13) + exponent_shift) | static_cast<uint32_t>(value.bits & 0x8000) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
