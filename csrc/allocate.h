// Memory from PyTorch's allocators. The stable ABI turns PyTorch's exceptions into error codes, so a failure is named
// here by its size: sgr_kernels/ops.py raises PyTorch's own error for it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <limits>

#include "checks.h"

// What the last exception said: from torch 2.13 on. Weak, so that the binary loads under older ones.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace sgr {

inline int64_t bytes_of(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
  for (const int64_t extent : size) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return std::numeric_limits<int64_t>::max();
  }
  return bytes;
}

// Calls make(), which allocates so many bytes.
template <class F>
Tensor try_to(int64_t bytes, const F& make) {
  try {
    return make();
  } catch (const std::exception&) {
    const char* reason =
        torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
    STD_TORCH_CHECK(false, "could not allocate ", bytes, " bytes: ", reason ? reason : "PyTorch raised an error");
  }
}

inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype) {
  return try_to(bytes_of(size, dtype), [&] { return torch::stable::new_empty(like, size, dtype); });
}
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size) {
  return allocate(like, size, like.scalar_type());
}

inline Tensor make_contiguous(const Tensor& tensor) {
  return try_to(bytes_of(tensor.sizes(), tensor.scalar_type()), [&] { return torch::stable::contiguous(tensor); });
}

}  // namespace sgr
