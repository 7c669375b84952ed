// Runs the CPU kernels over ragged shapes in buffers of exactly the sizes they ask for, poisoned with NaN, for a build
// with -fsanitize=address,undefined; compares with sums over pixel pairs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

using namespace sgr;
using namespace sgr::cpu;

namespace {

// Memory of its own, so that the sanitizer sees every byte beyond either end; aligned as PyTorch aligns.
template <class T>
class Poisoned {
 public:
  explicit Poisoned(int64_t size) : size_(size) {
    const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    for (int64_t i = 0; i < size; ++i) data_[i] = std::numeric_limits<T>::quiet_NaN();
  }
  ~Poisoned() { std::free(data_); }
  Poisoned(const Poisoned&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  T* data_;
};

uint32_t state = 1;
double uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<double>(state >> 8) / (1 << 24) - 0.5;
}

// Entry (dy, dx) of the table that a spectrum stands for.
template <class T>
double entry(const Shape& shape, const T* lambda, int64_t dy, int64_t dx) {
  const Angles vertical(shape.rows), horizontal(shape.columns);
  double sum = 0.0;
  for (int64_t k = 0; k < shape.rows; ++k) {
    for (int64_t l = 0; l < shape.columns; ++l) {
      sum += lambda[k * shape.columns + l] * vertical.cosine(dy * (2 * k + 1)) * horizontal.cosine(dx * (2 * l + 1));
    }
  }
  return sum / static_cast<double>(shape.rows * shape.columns);
}

template <class T>
bool run(const Shape& shape, Dtype dtype) {
  const Kernels<T>& kernels = sgr::cpu::kernels<T>();
  const Plan plan = kernels.plan(shape);
  const Axis<T> vertical(shape.height, shape.rows, kernels.max_block());
  const Axis<T> horizontal(shape.width, shape.columns, kernels.max_block());
  const int64_t pixels = shape.height * shape.width, image = shape.channels * pixels;
  const int64_t frequencies = shape.rows * shape.columns;

  std::vector<T> images(shape.batch * image), result(images.size());
  Poisoned<T> spectrum(shape.parts * shape.channels * shape.channels * frequencies), packed(plan.spectrum_size);
  Poisoned<T> workspace(plan.workspace_size), scratch(plan.scratch_size), sums(plan.sums_size);
  Poisoned<double> forms(plan.row_panels * plan.packed);
  for (T& value : images) value = static_cast<T>(uniform());
  for (int64_t i = 0; i < spectrum.size(); ++i) spectrum[i] = static_cast<T>(uniform());
  for (int64_t i = 0; i < sums.size(); ++i) sums[i] = T(0);

  // 16-bit images: the upper halves of the numbers are bfloat16 themselves.
  std::vector<uint16_t> halves(images.size()), half_result(images.size());
  Images in{images.data(), dtype, {image, pixels, shape.width, 1}};
  Images out{result.data(), dtype, {image, pixels, shape.width, 1}};
  if (dtype == Dtype::bfloat16) {
    for (size_t i = 0; i < images.size(); ++i) {
      float value = static_cast<float>(images[i]);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      halves[i] = static_cast<uint16_t>(bits >> 16);
      bits &= 0xffff0000;
      memcpy(&value, &bits, 4);
      images[i] = static_cast<T>(value);
    }
    in.data = halves.data();
    out.data = half_result.data();
  }

  kernels.pack_spectrum(plan, spectrum.data(), true, packed.data(), 0, plan.row_panels);
  kernels.pack_spectrum(plan, spectrum.data(), false, packed.data(), 0, plan.row_panels);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    kernels.load(plan, in, block, workspace.data(), 0, shape.height);
    kernels.columns_forward(plan, vertical, workspace.data(), scratch.data(), 0, plan.column_panels);
    kernels.rows_accumulate(plan, horizontal, workspace.data(), workspace.data(), sums.data(), scratch.data(), 0,
                            plan.row_panels);
    kernels.rows_multiply(plan, horizontal, packed.data(), workspace.data(), true, forms.data(), scratch.data(), 0,
                          plan.row_panels);
    kernels.columns_inverse(plan, vertical, workspace.data(), scratch.data(), 0, plan.column_panels);
    kernels.store(plan, out, block, workspace.data(), 0, shape.height);
  }
  if (dtype == Dtype::bfloat16 || shape.parts != 1) return true;

  double worst = 0.0, norm = 0.0;
  for (int64_t c = 0; c < shape.channels; ++c) {
    const int64_t y = shape.height / 2, x = shape.width - 1;  // one pixel of the last image
    const T* last = images.data() + (shape.batch - 1) * image;
    double expected = 0.0;
    for (int64_t d = 0; d < shape.channels; ++d) {
      const T* lambda = spectrum.data() + (c * shape.channels + d) * frequencies;
      for (int64_t v = 0; v < shape.height; ++v) {
        for (int64_t u = 0; u < shape.width; ++u) {
          expected += entry(shape, lambda, y - v, x - u) * last[d * pixels + v * shape.width + u];
        }
      }
    }
    const double value = result[(shape.batch - 1) * image + c * pixels + y * shape.width + x];
    worst = std::fmax(worst, std::fabs(value - expected));
    norm = std::fmax(norm, std::fabs(expected));
  }
  return worst <= (sizeof(T) == 8 ? 1e-12 : 1e-5) * (1.0 + norm);
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, 1},     {3, 2, 1, 5, 1, 5, 1},     {5, 1, 7, 1, 7, 2, 1},     {7, 3, 5, 4, 5, 4, 1},
      {2, 5, 9, 17, 6, 11, 1},   {4, 1, 28, 28, 28, 28, 1}, {3, 3, 33, 20, 17, 31, 1}, {1, 1, 40, 70, 40, 70, 1},
      {20, 1, 2, 3, 2, 3, 1},    {3, 2, 6, 9, 6, 9, 4},     {2, 4, 15, 16, 15, 16, 4}, {2, 1, 96, 3, 96, 3, 1},
      {1, 2, 4, 105, 4, 105, 1},
  };
  const char* names[8];
  const int count = instruction_sets(names, 8);
  int failures = 0;
  for (int i = 0; i < count; ++i) {
    select_instruction_set(names[i]);
    for (const Shape& shape : shapes) {
      const bool right =
          run<float>(shape, Dtype::float32) && run<double>(shape, Dtype::float64) && run<float>(shape, Dtype::bfloat16);
      if (right) continue;
      ++failures;
      std::printf("%s: wrong for (%d, %d, %d, %d)\n", names[i], int(shape.batch), int(shape.channels),
                  int(shape.height), int(shape.width));
    }
  }
  std::printf("%d instruction sets, %d failures\n", count, failures);
  return failures != 0;
}
