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

// Odd frequencies of one axis: theta_k = pi (2k + 1) / (2 F), k = 0..F-1. The angle s * theta_k is reduced
// modulo 2 pi in integers first, so that the values are exact to rounding at any size.
class OddFrequencies {
 public:
  explicit OddFrequencies(int64_t count) : count_(count), quarter_(count + 1) {
    const double step = 3.14159265358979323846 / static_cast<double>(2 * count);
    for (int64_t m = 0; m < count; ++m) quarter_[m] = std::cos(step * static_cast<double>(m));
    quarter_[count] = 0.0;
  }

  double cosine(int64_t position, int64_t k) const { return cosine_of(position * (2 * k + 1)); }
  double sine(int64_t position, int64_t k) const { return cosine_of(position * (2 * k + 1) - count_); }

  // The factor that makes the rows of [cos(s theta_k) | sin(s theta_k)] orthonormal.
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(count_)); }

 private:
  // cos(pi m / (2 F)): even, of period 4 F.
  double cosine_of(int64_t m) const {
    m = (m < 0 ? -m : m) % (4 * count_);
    if (m > 2 * count_) m = 4 * count_ - m;
    return m <= count_ ? quarter_[m] : -quarter_[2 * count_ - m];
  }

  int64_t count_;
  std::vector<double> quarter_;  // cos(pi m / (2 F)), m = 0..F
};

}  // namespace sgr
