// Fourier transforms in registers, of real lines at their odd frequencies: a line has at most 2F pixels, F = R M, and M
// is the square of SIDE, 4 or 8.
//
// The pixels c[s] = x[s] - i x[s + F], s < F, and the frequencies theta_2j, which say everything of a real line, are
// one transform of length F, twisted. With s = b + M a and j = j' + R k
//   X[j] = sum_b exp(-2 pi i b k / M) t[j', b] sum_a exp(-2 pi i a j' / R) exp(-i pi a / (2R)) c[s],
//   t[j', b] = exp(-i pi b (4j' + 1) / (2F)):
// R pixels in a thread, and then a warp for each j', with SIDE of a line's M values in a thread. Shared memory brings
// them from one to the other. Backwards the same goes from last to first, on numbers whose real and imaginary parts
// have changed places, which conjugates all constants.
#pragma once

#include <type_traits>
#include <vector>

#include "../plan.h"
#include "device.cuh"

namespace sgr::cuda {

using Complex = float2;

constexpr int kMostRadix = 16;
// With 14 warps a multiprocessor has registers for two blocks.
__host__ __device__ constexpr int most_radix(int side) { return side == 4 ? 14 : kMostRadix; }
__host__ __device__ constexpr bool is_radix(int radix) { return radix != 11 && radix != 13; }

// 0 where a number of frequencies is none that these transforms serve.
inline int fourier_side(int frequencies) {
  for (int side : {4, 8}) {
    const int radix = frequencies / (side * side);
    if (frequencies == radix * side * side && radix >= 2 && radix <= most_radix(side) && is_radix(radix)) return side;
  }
  return 0;
}

struct FourierAxis {
  int pixels, frequencies, radix;
  const Complex* twiddles;                       // t, then exp(-2 pi i q m / M): fourier_twiddles
  Complex twist[kMostRadix], roots[kMostRadix];  // exp(-i pi n / (2R)), exp(-2 pi i n / R)
};

// exp(-i pi m / (2F)) as a pair.
inline void append_turn(std::vector<float>& numbers, const Angles& angles, int64_t m) {
  numbers.push_back(static_cast<float>(angles.cosine(m)));
  numbers.push_back(static_cast<float>(-angles.sine(m)));
}
inline std::vector<float> fourier_twiddles(int frequencies, int side) {
  const int square = side * side;
  const Angles all(frequencies), inner(square);
  std::vector<float> numbers;
  for (int64_t first = 0; first < frequencies / square; ++first)
    for (int64_t b = 0; b < square; ++b) append_turn(numbers, all, b * (4 * first + 1));
  for (int q = 0; q < side; ++q)
    for (int m = 0; m < side; ++m) append_turn(numbers, inner, 4 * q * m);
  return numbers;
}
inline FourierAxis fourier_axis(int pixels, int frequencies, int side, const float* twiddles) {
  FourierAxis axis{pixels, frequencies, frequencies / (side * side), reinterpret_cast<const Complex*>(twiddles),
                   {},     {}};
  const Angles angles(axis.radix);
  for (int n = 0; n < axis.radix; ++n) {
    axis.twist[n] = {static_cast<float>(angles.cosine(n)), static_cast<float>(-angles.sine(n))};
    axis.roots[n] = {static_cast<float>(angles.cosine(4 * n)), static_cast<float>(-angles.sine(4 * n))};
  }
  return axis;
}

__device__ inline Complex operator+(Complex a, Complex b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline Complex operator-(Complex a, Complex b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ inline Complex operator*(Complex a, Complex b) {
  return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}
__device__ inline Complex operator*(float a, Complex b) { return make_float2(a * b.x, a * b.y); }
__device__ inline Complex swapped(Complex z) { return make_float2(z.y, z.x); }

// roots[n] = exp(-2 pi i n / (R STEP)). All numbers of turns are known when this is compiled.
template <int R, int STEP, class Roots>
__device__ inline void butterfly(Complex (&z)[R], const Roots& roots) {
  if constexpr (R == 2) {
    const Complex first = z[0];
    z[0] = first + z[1];
    z[1] = first - z[1];
  } else if constexpr (R == 3 || R == 5 || R == 7) {
    Complex sum[R / 2], difference[R / 2], total = z[0];
    const Complex first = z[0];
#pragma unroll
    for (int p = 0; p < R / 2; ++p) {
      sum[p] = z[p + 1] + z[R - 1 - p];
      difference[p] = z[p + 1] - z[R - 1 - p];
      total = total + sum[p];
    }
    z[0] = total;
#pragma unroll
    for (int k = 1; k <= R / 2; ++k) {
      Complex even = first, odd = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int p = 0; p < R / 2; ++p) {
        const Complex root = roots[STEP * ((p + 1) * k % R)];
        even = even + root.x * sum[p];
        odd = odd + root.y * difference[p];
      }
      z[k] = make_float2(even.x - odd.y, even.y + odd.x);
      z[R - k] = make_float2(even.x + odd.y, even.y - odd.x);
    }
  } else {
    constexpr int A = R == 4 || R % 4 == 2 ? 2 : (R % 4 == 0 ? 4 : 3), B = R / A;
    Complex inner[B][A];
#pragma unroll
    for (int b = 0; b < B; ++b) {
#pragma unroll
      for (int a = 0; a < A; ++a) inner[b][a] = z[b + B * a];
      butterfly<A, STEP * B>(inner[b], roots);
    }
#pragma unroll
    for (int a = 0; a < A; ++a) {
      Complex outer[B];
#pragma unroll
      for (int b = 0; b < B; ++b) {
        const int n = a * b;
        const Complex value = inner[b][a];
        outer[b] = n == 0           ? value
                   : 4 * n == R     ? make_float2(value.y, -value.x)
                   : 2 * n == R     ? make_float2(-value.x, -value.y)
                   : 4 * n == 3 * R ? make_float2(-value.y, value.x)
                                    : value * roots[STEP * n];
      }
      butterfly<B, STEP * A>(outer, roots);
#pragma unroll
      for (int b = 0; b < B; ++b) z[a + A * b] = outer[b];
    }
  }
}

struct EighthTurns {  // what butterflies of 8 and of 4 ask for
  __device__ Complex operator[](int n) const {
    constexpr float kHalf = 0.70710678118654752f;
    return make_float2(n == 1 ? kHalf : -kHalf, -kHalf);
  }
};

// action(R), R == radix known when this is compiled.
template <int LEAST, int MOST, class Action>
__device__ inline void with_radix(int radix, const Action& action) {
  if constexpr (LEAST == MOST) {
    if constexpr (is_radix(LEAST)) action(std::integral_constant<int, LEAST>{});
  } else {
    constexpr int kMiddle = (LEAST + MOST) / 2;
    if (radix <= kMiddle)
      with_radix<LEAST, kMiddle>(radix, action);
    else
      with_radix<kMiddle + 1, MOST>(radix, action);
  }
}

// Of so many regions.
inline int fourier_shared_bytes(int side, int regions) {
  return static_cast<int>(sizeof(Complex)) * kWarp * (side + 1) * regions;
}

// What a block of R warps does with SETS sets of kLines lines; a lane belongs to one of a set's lines throughout.
template <int SIDE>
struct Fourier {
  static constexpr int kLines = kWarp / SIDE, kSquare = SIDE * SIDE;
  static constexpr int kThreads = kWarp * most_radix(SIDE);
  static constexpr int kRegion = kWarp * (SIDE + 1);  // of a warp, for a set; one row more than it has, for the banks

  const FourierAxis& axis;
  Complex* memory;
  int warp, place, line;  // `place` of SIDE

  __device__ Fourier(const FourierAxis& a, unsigned char* shared, int thread)
      : axis(a), memory(reinterpret_cast<Complex*>(shared)) {
    const int lane = thread % kWarp;
    warp = thread / kWarp;
    place = lane / kLines;
    line = lane % kLines;
  }

  __device__ Complex* region(int set, int first) const { return memory + (set * axis.radix + first) * kRegion + line; }

  // The block's tasks of the outer steps: action(R, set, b).
  template <int SETS, class Action>
  __device__ void for_pixels(const Action& action) const {
    with_radix<2, most_radix(SIDE)>(axis.radix, [&](auto radix) {
#pragma unroll 1
      for (int task = warp; task < SIDE * SETS; task += radix.value)
        action(radix, SETS == 1 ? 0 : task / SIDE, task % SIDE * SIDE + place);
    });
  }

  // x[s], s = b + M a, and x[s + F] where a line is so long, into shared memory; load(i) is x[b + i].
  template <int R, class Load>
  __device__ void analyse(int set, int b, const Load& load) const {
    const int left = axis.pixels - b, further = axis.frequencies;
    Complex z[R];
    if (axis.pixels > further) {
#pragma unroll
      for (int a = 0; a < R; ++a) {
        const float x = kSquare * a < left ? load(kSquare * a) : 0.0f;
        z[a] = make_float2(x, kSquare * a + further < left ? -load(kSquare * a + further) : 0.0f) * axis.twist[a];
      }
    } else {
#pragma unroll
      for (int a = 0; a < R; ++a) z[a] = (kSquare * a < left ? load(kSquare * a) : 0.0f) * axis.twist[a];
    }
    butterfly<R, 1>(z, axis.roots);
    Complex* target = region(set, 0) + b * kLines;
#pragma unroll
    for (int j = 0; j < R; ++j) target[j * kRegion] = z[j];
  }
  // The other way; store(i, value) takes x[b + i].
  template <int R, class Store>
  __device__ void synthesise(int set, int b, const Store& store) const {
    const int left = axis.pixels - b, further = axis.frequencies;
    const Complex* source = region(set, 0) + b * kLines;
    Complex z[R];
#pragma unroll
    for (int j = 0; j < R; ++j) z[j] = source[j * kRegion];
    butterfly<R, 1>(z, axis.roots);
#pragma unroll
    for (int a = 0; a < R; ++a) z[a] = swapped(z[a] * axis.twist[a]);
#pragma unroll
    for (int a = 0; a < R; ++a)
      if (kSquare * a < left) store(kSquare * a, z[a].x);
    if (axis.pixels <= further) return;
#pragma unroll
    for (int a = 0; a < R; ++a)
      if (kSquare * a + further < left) store(kSquare * a + further, -z[a].y);
  }

  // A warp's constants, fetched once for all sets.
  struct Turns {
    Complex outer[SIDE], inner[SIDE];
  };
  __device__ Turns turns() const {
    Turns result;
#pragma unroll
    for (int m = 0; m < SIDE; ++m) {
      result.outer[m] = axis.twiddles[warp * kSquare + place + SIDE * m];
      result.inner[m] = axis.twiddles[axis.frequencies + place * SIDE + m];
    }
    return result;
  }

  // Of length M: the i-th of a thread at place q is value q + SIDE i, before and after; `own` is the warp's region.
  __device__ void transform(Complex (&z)[SIDE], Complex* own, const Turns& turns) const {
    butterfly<SIDE, 1>(z, EighthTurns{});
    __syncwarp();
#pragma unroll
    for (int m = 0; m < SIDE; ++m) own[(m * (SIDE + 1) + place) * kLines] = m == 0 ? z[m] : z[m] * turns.inner[m];
    __syncwarp();
#pragma unroll
    for (int b = 0; b < SIDE; ++b) z[b] = own[(place * (SIDE + 1) + b) * kLines];
    butterfly<SIDE, 1>(z, EighthTurns{});
  }
  __device__ void load(Complex (&z)[SIDE], const Complex* own, const Turns& turns) const {
#pragma unroll
    for (int i = 0; i < SIDE; ++i) z[i] = own[(place + SIDE * i) * kLines] * turns.outer[i];
  }
  __device__ void store(const Complex (&z)[SIDE], Complex* own, const Turns& turns) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < SIDE; ++i) own[(place + SIDE * i) * kLines] = z[i] * turns.outer[i];
  }
};

}  // namespace sgr::cuda
