// The nearest positive semidefinite matrix of a small symmetric one, in registers.
#pragma once

#include "device.cuh"

namespace sgr::cuda {

// Upper triangles of symmetric C x C matrices, row by row; c <= d.
template <int C>
__host__ __device__ constexpr int triangle(int c, int d) {
  return c * C - c * (c - 1) / 2 + d - c;
}

// Cyclic Jacobi rotations. An angle is as good as float32 finds it, for the next sweep mends what it leaves over; that
// the rotation is orthogonal to float64's rounding is what nothing would mend.
template <int C>
__device__ inline void keep_positive_part(double (&a)[C * (C + 1) / 2]) {
  constexpr int kSweeps = C == 2 ? 3 : 6;
  double largest = 0.0;
#pragma unroll
  for (int e = 0; e < C * (C + 1) / 2; ++e) largest = fmax(largest, fabs(a[e]));
  const double inverse = largest > 0.0 ? 1.0 / largest : 0.0;
#pragma unroll
  for (int e = 0; e < C * (C + 1) / 2; ++e) a[e] *= inverse;
  const auto at = [&](int c, int d) -> double& { return a[c < d ? triangle<C>(c, d) : triangle<C>(d, c)]; };
  double vectors[C][C];  // in columns
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int d = 0; d < C; ++d) vectors[c][d] = c == d ? 1.0 : 0.0;
#pragma unroll 1
  for (int sweep = 0; C > 1 && sweep < kSweeps; ++sweep)
#pragma unroll
    for (int p = 0; p < C; ++p)
#pragma unroll
      for (int q = p + 1; q < C; ++q) {
        const double first = at(p, p), last = at(q, q), between = at(p, q);
        const float gap = static_cast<float>(last - first), twice = 2.0f * static_cast<float>(between);
        const float denominator = fabsf(gap) + sqrtf(gap * gap + twice * twice);
        const float ratio = denominator > 0.0f ? twice / denominator : 0.0f;
        const double tangent = gap < 0.0f ? -ratio : ratio, square = 1.0 + tangent * tangent;
        double c = rsqrtf(static_cast<float>(square));
#pragma unroll
        for (int newton = 0; newton < 2; ++newton) c *= 1.5 - 0.5 * square * c * c;
        const double s = tangent * c;
        at(p, p) = c * (c * first - s * between) - s * (c * between - s * last);
        at(q, q) = s * (s * first + c * between) + c * (s * between + c * last);
        at(p, q) = (c * c - s * s) * between + c * s * (first - last);
#pragma unroll
        for (int r = 0; r < C; ++r) {
          if (r != p && r != q) {
            const double with_p = at(r, p), with_q = at(r, q);
            at(r, p) = c * with_p - s * with_q;
            at(r, q) = s * with_p + c * with_q;
          }
          const double left = vectors[r][p], right = vectors[r][q];
          vectors[r][p] = c * left - s * right;
          vectors[r][q] = s * left + c * right;
        }
      }
  double eigenvalue[C];
#pragma unroll
  for (int e = 0; e < C; ++e) eigenvalue[e] = fmax(at(e, e), 0.0) * largest;
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int d = c; d < C; ++d) {
      double sum = 0.0;
#pragma unroll
      for (int e = 0; e < C; ++e) sum += eigenvalue[e] * vectors[c][e] * vectors[d][e];
      at(c, d) = sum;
    }
}

}  // namespace sgr::cuda
