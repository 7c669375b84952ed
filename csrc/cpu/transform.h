// The one-dimensional transforms on V vectors side by side (see axis.h for the mathematics).
#pragma once

#include "axis.h"
#include "simd.h"

namespace sgr::cpu {
namespace SGR_ISA {

// The largest block: its two kinds of sums, R x V vectors each, and what the innermost loop needs beside one
// kind of them fit the registers (32, or 16 with a few set aside between the loops).
constexpr int kMaxBlock = SGR_VECTOR_BYTES == 64 ? 6 : 4;

// sum[r * V + v] = sum over i of coefficients[i][r] * in[i][v]. I is 0..R*V-1: constant indices, for
// registers.
template <class T, int R, int V, int... I>
inline void combine(const T* coefficients, int32_t terms, const Vec<T>* in, Vec<T> (&sum)[R * V],
                    std::integer_sequence<int, I...>) {
  ((sum[I] = Vec<T>{}), ...);
  for (int32_t i = 0; i < terms; ++i) {
    ((sum[I] += coefficients[I / V] * in[I % V]), ...);
    coefficients += R;
    in += V;
  }
}

template <class T, int R, int V, int... I>
inline void store_sums(const Block& block, const Vec<T> (&p)[R * V], const Vec<T> (&q)[R * V], T* out, int64_t stride,
                       std::integer_sequence<int, I...>) {
  constexpr int lanes = Simd<T>::lanes;
  T* plus = out + block.plus * stride;
  T* minus = out + block.minus * stride;
  const int64_t plus_step = block.plus_step * stride, minus_step = block.minus_step * stride;
  (store<T>(plus + (I / V) * plus_step + (I % V) * lanes, p[I] + q[I]), ...);
  ((I / V < R - 1 || block.last_has_partner ? store<T>(minus + (I / V) * minus_step + (I % V) * lanes, p[I] - q[I])
                                            : void()),
   ...);
}

template <class T, int R, int V>
inline void run_block(const Block& block, const T* coefficients, const Vec<T>* in, T* out, int64_t stride) {
  constexpr auto all = std::make_integer_sequence<int, R * V>();
  const T* cp = coefficients + block.coefficients;
  const T* cq = cp + block.terms_p * R;
  Vec<T> p[R * V], q[R * V];
  combine<T, R, V>(cp, block.terms_p, in + block.input_p * V, p, all);
  combine<T, R, V>(cq, block.terms_q, in + block.input_q * V, q, all);
  store_sums<T, R, V>(block, p, q, out, stride, all);
}

template <class T, int V>
inline void run_blocks(const std::vector<Block>& blocks, const T* coefficients, const Vec<T>* in, T* out,
                       int64_t stride) {
  for (const Block* block = blocks.data(); block != blocks.data() + blocks.size(); ++block) {
    switch (block->size) {
      case 1: run_block<T, 1, V>(*block, coefficients, in, out, stride); break;
      case 2: run_block<T, 2, V>(*block, coefficients, in, out, stride); break;
      case 3: run_block<T, 3, V>(*block, coefficients, in, out, stride); break;
      case 4: run_block<T, 4, V>(*block, coefficients, in, out, stride); break;
#if SGR_VECTOR_BYTES == 64
      case 5: run_block<T, 5, V>(*block, coefficients, in, out, stride); break;
      case 6: run_block<T, 6, V>(*block, coefficients, in, out, stride); break;
#endif
    }
  }
}

// out[2F rows] = transform of in[N rows]; both `stride` elements apart, possibly the same memory.
// classes: class_rows() * V vectors of scratch.
template <class T, int V>
void transform_forward(const Axis<T>& axis, const T* in, int64_t in_stride, Vec<T>* classes, T* out,
                       int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  const T* center = in + axis.center * in_stride;
  for (int v = 0; v < V; ++v) classes[v] = load<T>(center + v * lanes);
  for (int64_t s = 1; s <= axis.reach; ++s) {
    const bool odd = s % 2 == 1;
    Vec<T>* even_part = classes + (axis.pixel_class(odd ? 1 : 0) + s / 2) * V;
    Vec<T>* odd_part = classes + (axis.pixel_class(odd ? 2 : 3) + (s - 1) / 2) * V;
    for (int v = 0; v < V; ++v) {
      const Vec<T> right = load<T>(center + s * in_stride + v * lanes);
      const Vec<T> left = s <= axis.center ? load<T>(center - s * in_stride + v * lanes) : Vec<T>{};
      even_part[v] = right + left;
      odd_part[v] = right - left;
    }
  }
  run_blocks<T, V>(axis.forward, axis.coefficients.data(), classes, out, out_stride);
}

// The transpose of transform_forward: in[2F rows] to out[N rows].
template <class T, int V>
void transform_inverse(const Axis<T>& axis, const T* in, int64_t in_stride, Vec<T>* classes, T* out,
                       int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t k = 0; k < axis.low; ++k) {
    const int64_t partner = axis.frequencies - 1 - k;
    for (int kind = 0; kind < 2; ++kind) {
      const T* rows = in + kind * axis.frequencies * in_stride;
      Vec<T>* plus = classes + (axis.frequency_class(2 * kind) + k) * V;
      Vec<T>* minus = classes + (axis.frequency_class(2 * kind + 1) + k) * V;
      for (int v = 0; v < V; ++v) {
        const Vec<T> low = load<T>(rows + k * in_stride + v * lanes);
        const Vec<T> high = partner > k ? load<T>(rows + partner * in_stride + v * lanes) : Vec<T>{};
        plus[v] = low + high;
        minus[v] = low - high;
      }
    }
  }
  run_blocks<T, V>(axis.inverse, axis.coefficients.data(), classes, out, out_stride);
}

}  // namespace SGR_ISA
}  // namespace sgr::cpu
