// Row panels: the second transform, and what happens between the transforms, frequency by frequency.
#pragma once

#include "kernels.h"
#include "transform.h"

namespace sgr::cpu {
namespace SGR_ISA {

// The rows of the workspace that one panel treats: lane j holds row frequency k of packed image p, with
// p F + k = panel * lanes + j. Lanes beyond the last one repeat it, results included.
template <class T>
struct Panel {
  static constexpr int lanes = Simd<T>::lanes;

  Panel(const Plan& plan, int64_t panel) : plan(plan) {
    const int64_t total = plan.packed * plan.shape.rows, first = panel * lanes;
    valid = static_cast<int>(total - first < lanes ? total - first : lanes);
    int64_t p = first / plan.shape.rows, k = first % plan.shape.rows;
    for (int j = 0; j < lanes; ++j) {
      image[j] = p;
      frequency[j] = k;
      offset[j] = k * plan.stride + p * plan.shape.width;
      if (j + 1 >= valid) continue;
      if (++k == plan.shape.rows) {
        k = 0;
        ++p;
      }
    }
  }

  // Offset of a channel's cosine (0) or sine (1) rows.
  int64_t base(int64_t channel, int kind) const {
    return channel * plan.packed * plan.shape.width + kind * plan.shape.rows * plan.stride;
  }

  // sums[p] = the sum of the lanes that belong to packed image p.
  void sum_by_image(const double (&values)[lanes], double* sums) const {
    for (int64_t p = 0; p < plan.packed; ++p) sums[p] = 0.0;
    for (int j = 0; j < valid;) {
      const int64_t p = image[j];
      double sum = 0.0;
      for (; j < valid && image[j] == p; ++j) sum += values[j];
      sums[p] = sum;
    }
  }

  const Plan& plan;
  int valid;
  int64_t image[lanes], frequency[lanes], offset[lanes];
};

// Two vectors per pixel or frequency: the panel's cosine rows and its sine rows.
constexpr int kKinds = 2;

// Columns [0, width) of the panel's rows, transposed: pixels[x * kKinds + kind]. The tile at the right edge
// overlaps its neighbour rather than run past the row; only rows narrower than a vector are read beyond their
// end (the workspace has room), into pixels that nobody uses.
template <class T>
inline void load_pixels(const Panel<T>& panel, int64_t channel, const T* workspace, Vec<T>* pixels) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t width = panel.plan.shape.width;
  for (int kind = 0; kind < kKinds; ++kind) {
    const T* rows = workspace + panel.base(channel, kind);
    for (int64_t next = 0; next < width; next += lanes) {
      const int64_t x = width < lanes || next + lanes <= width ? next : width - lanes;
      Vec<T> tile[lanes];
      for (int j = 0; j < lanes; ++j) tile[j] = load<T>(rows + panel.offset[j] + x);
      transpose<T>(tile);
      for (int i = 0; i < lanes; ++i) pixels[(x + i) * kKinds + kind] = tile[i];
    }
  }
}

template <class T>
inline void store_pixels(const Panel<T>& panel, int64_t channel, const Vec<T>* pixels, T* workspace) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t width = panel.plan.shape.width;
  for (int kind = 0; kind < kKinds; ++kind) {
    T* rows = workspace + panel.base(channel, kind);
    for (int64_t next = 0; next < width; next += lanes) {
      const int64_t x = width < lanes || next + lanes <= width ? next : width - lanes;
      Vec<T> tile[lanes];
      for (int i = 0; i < lanes; ++i) tile[i] = pixels[(x + i) * kKinds + kind];
      transpose<T>(tile);
      for (int j = 0; j < lanes; ++j) {
        if (width >= lanes) {
          store<T>(rows + panel.offset[j] + x, tile[j]);
        } else {
          __builtin_memcpy(rows + panel.offset[j], &tile[j], width * sizeof(T));
        }
      }
    }
  }
}

// The four parities of one frequency, Z[i]: bit 0 of i tells cosine from sine of k, bit 1 of l. A spectrum's
// part p is odd in the axes whose bits are set in p; it multiplies Z turned in those axes: cosine <- sine,
// sine <- -cosine. (An even spectrum has part 0 only.)
constexpr bool turned_sign(int part, int i) { return (part & i) == 1 || (part & i) == 2; }

// Offset of Z[i] at column frequency l within a channel's plane of transformed vectors.
inline int64_t parity(const Shape& shape, int64_t l, int i) { return (l + (i / 2) * shape.columns) * kKinds + i % 2; }

// So many frequencies are summed in single precision before the sum goes on in double: long axes have thousands.
constexpr int64_t kTermsOfSum = 32;

// transformed <- Lambda transformed, per frequency; form: Z . Lambda Z, lane by lane. C: the number of channels, 0
// if it is not known at compile time; mixed: four vectors per channel.
template <class T, int C, int Parts>
inline void multiply(const Plan& plan, const T* spectrum, Vec<T>* transformed, Vec<T>* mixed,
                     double (&total)[Simd<T>::lanes]) {
  constexpr int lanes = Simd<T>::lanes;
  for (double& lane : total) lane = 0.0;
  const int64_t channels = C ? C : plan.shape.channels, plane = 2 * plan.shape.columns * kKinds;
  Vec<T> fixed[C ? 4 * C : 1], form[4] = {};
  Vec<T>* y = C ? fixed : mixed;
  for (int64_t l = 0; l < plan.shape.columns; ++l) {
    const int64_t position[4] = {parity(plan.shape, l, 0), parity(plan.shape, l, 1), parity(plan.shape, l, 2),
                                 parity(plan.shape, l, 3)};
    for (int64_t c = 0; c < channels; ++c) {
      Vec<T> sum[4] = {};
      for (int part = 0; part < Parts; ++part) {
        for (int64_t d = 0; d < channels; ++d) {
          const Vec<T> lambda = load<T>(spectrum + ((part * channels + c) * channels + d) * lanes);
          for (int i = 0; i < 4; ++i) {
            const Vec<T> z = transformed[d * plane + position[i ^ part]];
            sum[i] += turned_sign(part, i) ? -lambda * z : lambda * z;
          }
        }
      }
      for (int i = 0; i < 4; ++i) {
        y[c * 4 + i] = sum[i];
        form[i] += sum[i] * transformed[c * plane + position[i]];
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int i = 0; i < 4; ++i) transformed[c * plane + position[i]] = y[c * 4 + i];
    }
    spectrum += Parts * channels * channels * lanes;
    if ((l + 1) % kTermsOfSum == 0 || l + 1 == plan.shape.columns) {
      const Vec<T> sum = (form[0] + form[1]) + (form[2] + form[3]);
      for (int j = 0; j < lanes; ++j) total[j] += static_cast<double>(sum[j]);
      for (Vec<T>& part : form) part = Vec<T>{};
    }
  }
}

template <class T>
inline void multiply(const Plan& plan, const T* spectrum, Vec<T>* transformed, Vec<T>* mixed,
                     double (&total)[Simd<T>::lanes]) {
  if (plan.shape.parts == 4) return multiply<T, 0, 4>(plan, spectrum, transformed, mixed, total);
  switch (plan.shape.channels) {
    case 1: return multiply<T, 1, 1>(plan, spectrum, transformed, mixed, total);
    case 2: return multiply<T, 2, 1>(plan, spectrum, transformed, mixed, total);
    case 3: return multiply<T, 3, 1>(plan, spectrum, transformed, mixed, total);
    case 4: return multiply<T, 4, 1>(plan, spectrum, transformed, mixed, total);
    default: return multiply<T, 0, 1>(plan, spectrum, transformed, mixed, total);
  }
}

// sums[l][part][c][c'] += Z^a_c Z^b_c', the latter turned, over the parities; only c <= c' if both are the
// same.
template <class T, int C, int Parts>
inline void accumulate_products(const Plan& plan, const Vec<T>* a, const Vec<T>* b, T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t channels = C ? C : plan.shape.channels, plane = 2 * plan.shape.columns * kKinds;
  for (int64_t l = 0; l < plan.shape.columns; ++l) {
    for (int part = 0; part < Parts; ++part) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t d = a == b ? c : 0; d < channels; ++d) {
          T* sum = sums + (((l * Parts + part) * channels + c) * channels + d) * lanes;
          Vec<T> value = load<T>(sum);
          for (int i = 0; i < 4; ++i) {
            const Vec<T> za = a[c * plane + parity(plan.shape, l, i)];
            const Vec<T> zb = b[d * plane + parity(plan.shape, l, i ^ part)];
            value += turned_sign(part, i) ? -za * zb : za * zb;
          }
          store<T>(sum, value);
        }
      }
    }
  }
}

template <class T>
inline void accumulate_products(const Plan& plan, const Vec<T>* a, const Vec<T>* b, T* sums) {
  if (plan.shape.parts == 4) return accumulate_products<T, 0, 4>(plan, a, b, sums);
  switch (plan.shape.channels) {
    case 1: return accumulate_products<T, 1, 1>(plan, a, b, sums);
    case 3: return accumulate_products<T, 3, 1>(plan, a, b, sums);
    default: return accumulate_products<T, 0, 1>(plan, a, b, sums);
  }
}

}  // namespace SGR_ISA
}  // namespace sgr::cpu
