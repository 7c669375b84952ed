// Sizes and constants that the CPU and the CUDA kernels share. Plain C++: no torch, no CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace sgr {

// Sizes of one call: `batch` images of `channels` planes, height x width pixels each, and the numbers of
// odd frequencies along the two axes. Spectra are (channels, channels, rows, columns); those of signed tables
// are stacks of four such parts (even-even, odd-even, even-odd, odd-odd in dy and dx).
struct Shape {
  int64_t batch, channels, height, width, rows, columns;
  int64_t parts;  // 1 or 4
};

// Cosines and sines of the angles pi m / (2 F). They are reduced in integers first, so that the values are exact to
// rounding at any size. The odd frequencies of an axis are theta_k = pi (2k + 1) / (2 F), k = 0..F-1: at position s
// the angle is m = s (2k + 1).
class Angles {
 public:
  explicit Angles(int64_t frequencies) : count_(frequencies), quarter_(frequencies + 1) {
    const double step = 3.14159265358979323846 / static_cast<double>(2 * count_);
    for (int64_t m = 0; m < count_; ++m) quarter_[m] = std::cos(step * static_cast<double>(m));
    quarter_[count_] = 0.0;
  }

  double cosine(int64_t m) const {
    m = (m < 0 ? -m : m) % (4 * count_);
    if (m > 2 * count_) m = 4 * count_ - m;
    return m <= count_ ? quarter_[m] : -quarter_[2 * count_ - m];
  }
  double sine(int64_t m) const { return cosine(m - count_); }

 private:
  int64_t count_;
  std::vector<double> quarter_;  // cos(pi m / (2 F)), m = 0..F
};

}  // namespace sgr
