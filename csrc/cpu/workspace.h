// What the CPU operators share: views of tensors, scratch memory, and the division of work among threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../allocate.h"
#include "../checks.h"
#include "kernels.h"

namespace sgr::cpu {

inline Images images_of(const Tensor& tensor) {
  Images images;
  images.data = const_cast<void*>(tensor.const_data_ptr());
  switch (tensor.scalar_type()) {
    case ScalarType::Double: images.dtype = Dtype::float64; break;
    case ScalarType::BFloat16: images.dtype = Dtype::bfloat16; break;
    case ScalarType::Half: images.dtype = Dtype::float16; break;
    default: images.dtype = Dtype::float32;
  }
  for (int i = 0; i < 4; ++i) images.strides[i] = tensor.stride(i);
  return images;
}

// Uninitialised memory, from PyTorch's allocator: aligned to cache lines, and its own error when there is
// none.
template <class T>
class Buffer {
 public:
  Buffer(const Tensor& like, int64_t size)
      : tensor_(allocate(like, {size}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float)),
        data_(static_cast<T*>(tensor_.mutable_data_ptr())) {}
  T* data() const { return data_; }

 private:
  Tensor tensor_;
  T* data_;
};

// Calls work(slot, begin, end) for `slots` equal parts of [0, count), in parallel.
template <class F>
void share(int64_t count, int64_t slots, const F& work) {
  slots = std::min(slots, count);
  if (slots <= 1) {
    if (count > 0) work(int64_t{0}, int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) work(slot, slot * count / slots, (slot + 1) * count / slots);
  });
}

// Threads worth starting for this many multiply-adds.
inline int64_t useful_threads(double operations) {
  constexpr double kOperationsPerThread = 2e5;  // about as long as starting a thread takes
  const double useful = std::min<double>(torch::stable::get_num_threads(), operations / kOperationsPerThread);
  return std::max<int64_t>(1, static_cast<int64_t>(useful));
}

// Multiply-adds of one forward transform of the whole batch.
inline double transform_operations(const Shape& shape) {
  const double height = static_cast<double>(shape.height), width = static_cast<double>(shape.width);
  const double rows = static_cast<double>(shape.rows), columns = static_cast<double>(shape.columns);
  return static_cast<double>(shape.batch * shape.channels) * (height * width * rows + 2 * rows * width * columns) / 2;
}

// The transforms of both axes; a square image has only one.
template <class T>
class Axes {
 public:
  Axes(const Shape& shape, int max_block) : vertical_(shape.height, shape.rows, max_block) {
    if (shape.width != shape.height || shape.columns != shape.rows) {
      horizontal_ = std::make_unique<Axis<T>>(shape.width, shape.columns, max_block);
    }
  }
  const Axis<T>& vertical() const { return vertical_; }
  const Axis<T>& horizontal() const { return horizontal_ ? *horizontal_ : vertical_; }

 private:
  Axis<T> vertical_;
  std::unique_ptr<Axis<T>> horizontal_;
};

}  // namespace sgr::cpu
