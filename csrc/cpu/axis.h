// The transform of one axis, as small matrix products on rows of vectors.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan.h"

namespace sgr::cpu {

// One small product: P[r] = sum_i coefficients[i][r] * in[input_p + i], Q[r] likewise over the rows from input_q;
// out[plus + r plus_step] = P[r] + Q[r] and out[minus + r minus_step] = P[r] - Q[r].
struct Block {
  int32_t size;  // number of r
  int32_t terms_p, terms_q;
  int32_t input_p, input_q;
  int32_t plus, plus_step;
  int32_t minus, minus_step;
  bool has_plus;          // whether any r writes its sum
  bool last_has_partner;  // whether the last r writes its difference
  int64_t coefficients;   // offset of [terms_p][size], followed by [terms_q][size]
};

template <class T>
struct Products {
  std::vector<Block> blocks;
  std::vector<T> coefficients;

  // p(i, r) and q(i, r) are the coefficients of a block that is otherwise filled in.
  template <class P, class Q>
  void add(Block block, const P& p, const Q& q) {
    block.coefficients = static_cast<int64_t>(coefficients.size());
    for (int32_t i = 0; i < block.terms_p; ++i) {
      for (int32_t r = 0; r < block.size; ++r) coefficients.push_back(static_cast<T>(p(i, r)));
    }
    for (int32_t i = 0; i < block.terms_q; ++i) {
      for (int32_t r = 0; r < block.size; ++r) coefficients.push_back(static_cast<T>(q(i, r)));
    }
    blocks.push_back(block);
  }
};

// N pixels to F odd frequencies by matrix products. With positions s counted from the middle pixel c, the axis has an
// even part e_s = x[c+s] + x[c-s] and an odd part o_s = x[c+s] - x[c-s]. Since s (pi - theta) = s pi - s theta,
// frequencies k and F-1-k share their cosines up to the sign (-1)^s: even and odd s halve the matrices once more.
//     Z_cos[k]     = P + Q    P = sum over even s of e_s cos(s theta_k)    Q = the same over odd s
//     Z_cos[F-1-k] = P - Q
// (sines: P over odd s, Q over even s), and the transpose of all this for the way back.
template <class T>
struct DirectTransform {
  // max_block: the largest block the kernels have registers for.
  DirectTransform(int64_t pixels, int64_t frequencies, int max_block);

  int64_t pixels, frequencies;
  int64_t center;  // index of the pixel at position 0
  int64_t reach;   // largest position; for even N that position has no mirror image
  int64_t low;     // number of frequencies k with k <= F-1-k
  Products<T> forward, inverse;

  // Where the four classes of rows begin that the kernels split their input into.
  // Pixels: even part at even s, even part at odd s, odd part at odd s, odd part at even s >= 2.
  int64_t pixel_class(int i) const {
    const int64_t even = reach / 2 + 1, odd = (reach + 1) / 2;
    return i == 0 ? 0 : i == 1 ? even : i == 2 ? even + odd : even + 2 * odd;
  }
  // Frequencies: cosines plus and minus their partners, sines plus and minus theirs.
  int64_t frequency_class(int i) const { return i * low; }

 private:
  int32_t positions_from(int64_t first) const;  // how many of first, first + 2, .. up to the reach
  void add_forward(const Angles& angles, int64_t k, int size, bool sine);
  void add_inverse(const Angles& angles, int64_t s, int size);
};

// The transform of an axis: direct, or for large sizes in two levels. The m interleaved subsequences x[n + j m] have
// direct transforms C - i S at the odd frequencies theta'_q of F/m; turned by n theta'_q / m they are the inputs of a
// discrete Fourier transform of length m, whose output h is at the frequency (theta'_q + 2 pi h) / m. That is
// theta_k with k = q + 2 (F/m) h, or above pi, mirrored and conjugate, k = 2 (F/m) (m - h) - q - 1.
template <class T>
struct Axis {
  Axis(int64_t pixels, int64_t frequencies, int max_block);

  int64_t frequencies;
  int64_t length;  // m; 1 if the direct transform is all
  DirectTransform<T> direct;
  Products<T> forward, inverse;  // the Fourier transform, with its outputs at the rows of q = 0
  std::vector<T> rotations;      // [q][n]: cosine and sine of n theta'_q / m

  // Where the classes of rows begin in the Fourier transform's input: cosines of n (or h) and of its mirror image
  // added, sines added (or subtracted, for h), sines subtracted (added), cosines subtracted.
  int64_t fourier_class(int i) const {
    const int64_t full = length / 2 + 1, partial = (length - 1) / 2;
    return i <= 2 ? i * full : 2 * full + partial;
  }

  // Rows of scratch that the kernels need at most.
  static int64_t scratch_rows(int64_t pixels, int64_t frequencies) {
    const int64_t classes = 2 * frequencies + 4;
    return 2 * frequencies + (classes > pixels + 1 ? classes : pixels + 1);
  }

 private:
  static int64_t best_length(int64_t pixels, int64_t frequencies);
  void add_forward(const Angles& angles, int64_t h, int size);
  void add_inverse(const Angles& angles, int64_t n, int size);
};

}  // namespace sgr::cpu
