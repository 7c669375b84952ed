// The number formats of tensor cores on the host, for tables of constants: ties to even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace sgr::cuda {

// x rounded to `bits` bits below the first one of its mantissa, or of that of 2^smallest where x is less.
inline double round_mantissa(double x, int bits, int smallest) {
  if (x == 0.0) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), smallest) - bits);
  return std::nearbyint(x / unit) * unit;
}
inline uint32_t float_bits(double x) {
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint32_t tf32_bits(double x) { return float_bits(round_mantissa(x, 10, -126)); }
inline uint16_t bfloat16_bits(double x) { return float_bits(round_mantissa(x, 7, -126)) >> 16; }
inline uint16_t half_bits(double x) {  // |x| < 65520
  const double magnitude = std::fabs(round_mantissa(x, 10, -14));
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (magnitude < std::ldexp(1.0, -14)) return sign | static_cast<uint16_t>(std::ldexp(magnitude, 24));
  return sign | static_cast<uint16_t>((float_bits(magnitude) >> 13) - (112 << 10));
}
inline double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

}  // namespace sgr::cuda
