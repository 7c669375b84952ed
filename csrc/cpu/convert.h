// Rows of images in their own dtype to and from the compute type. Written without branches, for
// vectorisation.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace sgr::cpu {
namespace SGR_ISA {

template <class To, class From>
inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation");
  To result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

struct BFloat16 {
  uint16_t bits;

  explicit operator float() const { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }
  explicit BFloat16(float value) {
    const uint32_t u = bits_of<uint32_t>(value);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

struct Float16 {
  uint16_t bits;

  explicit operator float() const {
    const uint32_t magnitude = bits & 0x7fff, sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);  // the exponent biases differ by 112
    // Below the smallest normal number the mantissa counts units of 2^-24, and so do the last bits of 0.5.
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(0x3f000000 | magnitude) - 0.5f);
    const uint32_t special = (magnitude << 13) | 0x7f800000;
    const uint32_t result = magnitude < 0x0400 ? subnormal : magnitude < 0x7c00 ? normal : special;
    return bits_of<float>(result | sign);
  }
  explicit Float16(float value) {
    const uint32_t u = bits_of<uint32_t>(value), magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    // 0x38800000 is the smallest normal half, 0x477ff000 the first number that rounds to infinity.
    const uint32_t result = magnitude < 0x38800000 ? subnormal : magnitude < 0x477ff000 ? normal : special;
    bits = static_cast<uint16_t>(result | sign);
  }
};

template <class To, class From>
inline void convert_row(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t count) {
  if (from_stride != 1 || to_stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i * to_stride] = static_cast<To>(from[i * from_stride]);
    return;
  }
  if constexpr (std::is_same_v<To, From>) {
    // Whole vectors, of which the last overlaps the one before: rows are short, remainders as dear as the rest.
    constexpr int64_t lanes = Simd<To>::lanes;
    if (count >= lanes) {
      for (int64_t i = 0; i + lanes < count; i += lanes) store<To>(to + i, load<To>(from + i));
      return store<To>(to + count - lanes, load<To>(from + count - lanes));
    }
  }
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// Calls function(pointer), a pointer to the images' own element type. Double precision computes on float64
// only.
template <class T, class F>
inline void with_elements(const Images& images, const F& function) {
  if constexpr (sizeof(T) == sizeof(double)) {
    function(static_cast<double*>(images.data));
  } else {
    switch (images.dtype) {
      case Dtype::bfloat16: return function(static_cast<BFloat16*>(images.data));
      case Dtype::float16: return function(static_cast<Float16*>(images.data));
      default: return function(static_cast<float*>(images.data));
    }
  }
}

}  // namespace SGR_ISA
}  // namespace sgr::cpu
