// Vectors of SGR_VECTOR_BYTES, by the compilers' vector extension: the same source for every instruction set.
// Only headers without code of their own may be included here: what a translation unit compiled for AVX-512
// shares with others, the linker could hand to them.
#pragma once

#include <stdint.h>

#include <utility>

namespace sgr::cpu {
namespace SGR_ISA {

template <class T>
struct Simd {
  typedef T vec __attribute__((vector_size(SGR_VECTOR_BYTES)));
  static constexpr int lanes = SGR_VECTOR_BYTES / sizeof(T);
};

template <class T>
using Vec = typename Simd<T>::vec;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// a[0] b[0] a[1] b[1] .. : the lower (upper) half of both, interleaved.
template <class T, int... I>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, bool upper, std::integer_sequence<int, I...>) {
  constexpr int lanes = Simd<T>::lanes, half = lanes / 2;
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, (I / 2 + (I % 2 ? lanes : 0) + half)...)
               : __builtin_shufflevector(a, b, (I / 2 + (I % 2 ? lanes : 0))...);
#else
  typedef decltype(a < b) Mask;
  return upper ? __builtin_shuffle(a, b, Mask{(I / 2 + (I % 2 ? lanes : 0) + half)...})
               : __builtin_shuffle(a, b, Mask{(I / 2 + (I % 2 ? lanes : 0))...});
#endif
}

// Transposes a lanes x lanes tile: log2(lanes) perfect shuffles of its rows.
template <class T>
inline void transpose(Vec<T> (&tile)[Simd<T>::lanes]) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr auto order = std::make_integer_sequence<int, lanes>();
  for (int round = 1; round < lanes; round *= 2) {
    Vec<T> next[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave<T>(tile[i], tile[i + lanes / 2], false, order);
      next[2 * i + 1] = interleave<T>(tile[i], tile[i + lanes / 2], true, order);
    }
    for (int i = 0; i < lanes; ++i) tile[i] = next[i];
  }
}

}  // namespace SGR_ISA
}  // namespace sgr::cpu
