// float16, rounded to nearest even, denormals included.
#pragma once

#include <bit>
#include <cstdint>

#include "vector_types.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float v) {
  const uint32_t all = std::bit_cast<uint32_t>(v), sign = all >> 16 & 0x8000u, bits = all & 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};                     // the card's NaN
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // from 65520 on
  if (bits < 0x38800000u) {                                    // below 2^-14: multiples of 2^-24,
    const float rounded = std::bit_cast<float>(bits) + 0.5f;   // the spacing of floats just above 1/2
    return {uint16_t(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((bits + 0xfffu + (bits >> 13 & 1) - 0x38000000u) >> 13))};
}
inline float __half2float(__half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31u, fraction = v.bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  const float magnitude =
      exponent ? std::bit_cast<float>((exponent + 112) << 23 | fraction << 13) : float(fraction) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
