// One axis of the separable transform, as a list of small matrix products ("blocks").
//
// With positions s counted from the middle pixel, an axis of N pixels has the even part e_s = x[c+s] + x[c-s]
// and the odd part o_s = x[c+s] - x[c-s]. Since s (pi - theta) = s pi - s theta, frequencies k and F-1-k
// share their cosines up to the sign (-1)^s: splitting s into even and odd halves both matrices once more.
//     Z_cos[k]     = P + Q    P = sum over even s of e_s cos(s theta_k)    Q = the same over odd s
//     Z_cos[F-1-k] = P - Q
// (sines: P over odd s, Q over even s), and the transpose of all this for the way back.
#pragma once

#include <vector>

#include "../plan.h"

namespace sgr::cpu {

// Computes P[r] = sum_i coefficients[i][r] * in[input_p + i], and Q[r] likewise over the rows from input_q,
// then writes out[plus + r plus_step] = P[r] + Q[r] and out[minus + r minus_step] = P[r] - Q[r].
struct Block {
  int32_t size;  // number of r
  int32_t terms_p, terms_q;
  int32_t input_p, input_q;
  int32_t plus, plus_step;
  int32_t minus, minus_step;
  bool last_has_partner;  // whether the last r writes its difference: a pixel at one end has no mirror image
  int64_t coefficients;   // offset of [terms_p][size], followed by [terms_q][size]
};

template <class T>
struct Axis {
  // max_block: the largest block the kernels have registers for.
  Axis(int64_t pixels, int64_t frequencies, int max_block);

  int64_t pixels, frequencies;
  int64_t center;  // index of the pixel at position 0
  int64_t reach;   // largest position; for even N that position has no mirror image
  int64_t low;     // number of frequencies k with k <= F-1-k
  std::vector<Block> forward, inverse;
  std::vector<T> coefficients;

  // Row offsets of the four classes that the kernels split the input into.
  // Pixels: even part at even s, even part at odd s, odd part at odd s, odd part at even s >= 2.
  int64_t pixel_class(int i) const {
    const int64_t even = reach / 2 + 1, odd = (reach + 1) / 2;
    return i == 0 ? 0 : i == 1 ? even : i == 2 ? even + odd : even + 2 * odd;
  }
  // Frequencies: cosines plus and minus their partners, sines plus and minus theirs.
  int64_t frequency_class(int i) const { return i * low; }
  int64_t class_rows() const {
    const int64_t pixel_rows = 2 * reach + 1, frequency_rows = 4 * low;
    return pixel_rows > frequency_rows ? pixel_rows : frequency_rows;
  }

 private:
  int32_t positions_from(int64_t first) const;  // how many of first, first + 2, .. up to the reach
  void add_forward(const OddFrequencies& odd, int64_t k, int size, bool sine);
  void add_inverse(const OddFrequencies& odd, int64_t s, int size);
};

}  // namespace sgr::cpu
