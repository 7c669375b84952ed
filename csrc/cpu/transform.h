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
inline void store_sums(const Block& block, const Vec<T> (&p)[R * V], const Vec<T> (&q)[R * V], T* plus, T* minus,
                       int64_t stride, std::integer_sequence<int, I...>) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t plus_step = block.plus_step * stride, minus_step = block.minus_step * stride;
  if (block.has_plus) (store<T>(plus + (I / V) * plus_step + (I % V) * lanes, p[I] + q[I]), ...);
  ((I / V < R - 1 || block.last_has_partner ? store<T>(minus + (I / V) * minus_step + (I % V) * lanes, p[I] - q[I])
                                            : void()),
   ...);
}

// Where a block writes: rows `stride` elements apart, sums and differences shifted by so many rows.
template <class T>
struct Output {
  T* data;
  int64_t stride, plus_shift, minus_shift;
};

template <class T, int R, int V>
inline void run_block(const Block& block, const T* coefficients, const Vec<T>* in, const Output<T>& out) {
  constexpr auto all = std::make_integer_sequence<int, R * V>();
  const T* cp = coefficients + block.coefficients;
  const T* cq = cp + block.terms_p * R;
  Vec<T> p[R * V], q[R * V];
  combine<T, R, V>(cp, block.terms_p, in + block.input_p * V, p, all);
  combine<T, R, V>(cq, block.terms_q, in + block.input_q * V, q, all);
  T* plus = out.data + (block.plus + out.plus_shift) * out.stride;
  T* minus = out.data + (block.minus + out.minus_shift) * out.stride;
  store_sums<T, R, V>(block, p, q, plus, minus, out.stride, all);
}

template <class T, int V>
inline void run_blocks(const Products<T>& products, const Vec<T>* in, const Output<T>& out) {
  const T* coefficients = products.coefficients.data();
  const Block* end = products.blocks.data() + products.blocks.size();
  for (const Block* block = products.blocks.data(); block != end; ++block) {
    switch (block->size) {
      case 1: run_block<T, 1, V>(*block, coefficients, in, out); break;
      case 2: run_block<T, 2, V>(*block, coefficients, in, out); break;
      case 3: run_block<T, 3, V>(*block, coefficients, in, out); break;
      case 4: run_block<T, 4, V>(*block, coefficients, in, out); break;
#if SGR_VECTOR_BYTES == 64
      case 5: run_block<T, 5, V>(*block, coefficients, in, out); break;
      case 6: run_block<T, 6, V>(*block, coefficients, in, out); break;
#endif
    }
  }
}

// out[2F rows] = direct transform of in[N rows]; both may be the same memory. classes: scratch.
template <class T, int V>
void direct_forward(const DirectTransform<T>& direct, const T* in, int64_t in_stride, Vec<T>* classes, T* out,
                    int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  const T* center = in + direct.center * in_stride;
  for (int v = 0; v < V; ++v) classes[v] = load<T>(center + v * lanes);
  for (int64_t s = 1; s <= direct.reach; ++s) {
    const bool odd = s % 2 == 1;
    Vec<T>* even_part = classes + (direct.pixel_class(odd ? 1 : 0) + s / 2) * V;
    Vec<T>* odd_part = classes + (direct.pixel_class(odd ? 2 : 3) + (s - 1) / 2) * V;
    for (int v = 0; v < V; ++v) {
      const Vec<T> right = load<T>(center + s * in_stride + v * lanes);
      const Vec<T> left = s <= direct.center ? load<T>(center - s * in_stride + v * lanes) : Vec<T>{};
      even_part[v] = right + left;
      odd_part[v] = right - left;
    }
  }
  run_blocks<T, V>(direct.forward, classes, {out, out_stride, 0, 0});
}

// The transpose of direct_forward: in[2F rows] to out[N rows].
template <class T, int V>
void direct_inverse(const DirectTransform<T>& direct, const T* in, int64_t in_stride, Vec<T>* classes, T* out,
                    int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t k = 0; k < direct.low; ++k) {
    const int64_t partner = direct.frequencies - 1 - k;
    for (int kind = 0; kind < 2; ++kind) {
      const T* rows = in + kind * direct.frequencies * in_stride;
      Vec<T>* plus = classes + (direct.frequency_class(2 * kind) + k) * V;
      Vec<T>* minus = classes + (direct.frequency_class(2 * kind + 1) + k) * V;
      for (int v = 0; v < V; ++v) {
        const Vec<T> low = load<T>(rows + k * in_stride + v * lanes);
        const Vec<T> high = partner > k ? load<T>(rows + partner * in_stride + v * lanes) : Vec<T>{};
        plus[v] = low + high;
        minus[v] = low - high;
      }
    }
  }
  run_blocks<T, V>(direct.inverse, classes, {out, out_stride, 0, 0});
}

// out[2F rows] = transform of in[N rows]; both may be the same memory. scratch: Axis::scratch_rows() * V vectors.
template <class T, int V>
void transform_forward(const Axis<T>& axis, const T* in, int64_t in_stride, Vec<T>* scratch, T* out,
                       int64_t out_stride) {
  if (axis.length == 1) return direct_forward<T, V>(axis.direct, in, in_stride, scratch, out, out_stride);
  const int64_t length = axis.length, frequencies = axis.direct.frequencies;
  Vec<T>* middle = scratch;  // [cosines, sines of q][n]
  Vec<T>* classes = scratch + 2 * axis.frequencies * V;
  for (int64_t n = 0; n < length; ++n) {
    direct_forward<T, V>(axis.direct, in + n * in_stride, length * in_stride, classes,
                         reinterpret_cast<T*>(middle + n * V), length * V * Simd<T>::lanes);
  }
  Vec<T>* cosines_added = classes + axis.fourier_class(0) * V;
  Vec<T>* sines_added = classes + axis.fourier_class(1) * V;
  Vec<T>* sines_subtracted = classes + axis.fourier_class(2) * V;
  Vec<T>* cosines_subtracted = classes + axis.fourier_class(3) * V;
  for (int64_t q = 0; q < frequencies; ++q) {
    const Vec<T>* cosines = middle + q * length * V;
    const Vec<T>* sines = cosines + axis.frequencies * V;
    const T* rotation = axis.rotations.data() + q * length * 2;
    const auto turned_cosine = [&](int64_t n, int v) {
      return rotation[2 * n] * cosines[n * V + v] - rotation[2 * n + 1] * sines[n * V + v];
    };
    const auto turned_sine = [&](int64_t n, int v) {
      return rotation[2 * n] * sines[n * V + v] + rotation[2 * n + 1] * cosines[n * V + v];
    };
    for (int64_t n = 0; n <= length / 2; ++n) {
      const bool alone = n == 0 || 2 * n == length;
      for (int v = 0; v < V; ++v) {
        const Vec<T> c = turned_cosine(n, v), s = turned_sine(n, v);
        if (alone) {
          cosines_added[n * V + v] = c;
          sines_added[n * V + v] = s;
          continue;
        }
        const Vec<T> c_mirror = turned_cosine(length - n, v), s_mirror = turned_sine(length - n, v);
        cosines_added[n * V + v] = c + c_mirror;
        sines_added[n * V + v] = s + s_mirror;
        cosines_subtracted[(n - 1) * V + v] = c - c_mirror;
        sines_subtracted[(n - 1) * V + v] = s - s_mirror;
      }
    }
    run_blocks<T, V>(axis.forward, classes, {out, out_stride, q, -q});
  }
}

// The transpose of transform_forward: in[2F rows] to out[N rows].
template <class T, int V>
void transform_inverse(const Axis<T>& axis, const T* in, int64_t in_stride, Vec<T>* scratch, T* out,
                       int64_t out_stride) {
  if (axis.length == 1) return direct_inverse<T, V>(axis.direct, in, in_stride, scratch, out, out_stride);
  constexpr int lanes = Simd<T>::lanes;
  const int64_t length = axis.length, frequencies = axis.direct.frequencies;
  Vec<T>* middle = scratch;
  Vec<T>* classes = scratch + 2 * axis.frequencies * V;
  Vec<T>* cosines_added = classes + axis.fourier_class(0) * V;
  Vec<T>* sines_subtracted = classes + axis.fourier_class(1) * V;
  Vec<T>* sines_added = classes + axis.fourier_class(2) * V;
  Vec<T>* cosines_subtracted = classes + axis.fourier_class(3) * V;
  const T* sine_rows = in + axis.frequencies * in_stride;
  for (int64_t q = 0; q < frequencies; ++q) {
    for (int64_t h = 0; h <= length / 2; ++h) {
      // Below pi, and its mirror image above.
      const int64_t below = (q + 2 * frequencies * h) * in_stride, above = (2 * frequencies * h - q - 1) * in_stride;
      const bool has_below = 2 * h != length, has_above = h != 0;
      for (int v = 0; v < V; ++v) {
        const Vec<T> c = has_below ? load<T>(in + below + v * lanes) : Vec<T>{};
        const Vec<T> s = has_below ? load<T>(sine_rows + below + v * lanes) : Vec<T>{};
        const Vec<T> c_mirror = has_above ? load<T>(in + above + v * lanes) : Vec<T>{};
        const Vec<T> s_mirror = has_above ? load<T>(sine_rows + above + v * lanes) : Vec<T>{};
        cosines_added[h * V + v] = c + c_mirror;
        sines_subtracted[h * V + v] = s - s_mirror;
        if (!has_below || !has_above) continue;
        cosines_subtracted[(h - 1) * V + v] = c - c_mirror;
        sines_added[(h - 1) * V + v] = s + s_mirror;
      }
    }
    Vec<T>* cosines = middle + q * length * V;
    Vec<T>* sines = cosines + axis.frequencies * V;
    run_blocks<T, V>(axis.inverse, classes, {reinterpret_cast<T*>(cosines), V * lanes, 0, 0});
    const T* rotation = axis.rotations.data() + q * length * 2;
    for (int64_t i = V; i < length * V; ++i) {
      const T cosine = rotation[i / V * 2], sine = rotation[i / V * 2 + 1];
      const Vec<T> c = cosines[i], s = sines[i];
      cosines[i] = cosine * c + sine * s;
      sines[i] = cosine * s - sine * c;
    }
  }
  for (int64_t n = 0; n < length; ++n) {
    direct_inverse<T, V>(axis.direct, reinterpret_cast<const T*>(middle + n * V), length * V * lanes, classes,
                         out + n * out_stride, length * out_stride);
  }
}

}  // namespace SGR_ISA
}  // namespace sgr::cpu
