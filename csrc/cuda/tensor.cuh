// Strided views of image batches in any of the four element types.
#pragma once

#include "device.cuh"

namespace sgr::cuda {

enum class Element : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

__host__ __device__ constexpr int64_t element_size(Element element) {
  return element == Element::kFloat64 ? 8 : (element == Element::kFloat32 ? 4 : 2);
}

// (B,C,H,W) with strides in elements; stride 0 is legal for what is only read.
struct ImageView {
  void* data;
  Element element;
  int64_t stride[4];
  bool dense = false;  // each image lies in one run of float32 that begins and ends at multiples of 16 bytes
};

// (C,C,Fh,Fw) in the compute type T, or four such parts `part_stride` apart: those of a signed table, which
// are even or odd in dy and dx (even-even, odd-even, even-odd, odd-odd).
template <class T>
struct SpectrumView {
  const T* data;
  int parts;  // 1 or 4
  int64_t part_stride;
  int64_t stride[4];

  __device__ T at(int part, int c, int d, int k, int l) const {
    return data[part * part_stride + c * stride[0] + d * stride[1] + k * stride[2] + l * stride[3]];
  }
  // Entry of (Sigma + Sigma')/2: transposing swaps the channels and negates the parts odd in one direction.
  __device__ T symmetric_at(int part, int c, int d, int k, int l) const {
    const T transposed = at(part, d, c, k, l);
    return T(0.5) * at(part, c, d, k, l) + T(0.5) * (part == 1 || part == 2 ? -transposed : transposed);
  }
};

struct Geometry {
  int64_t batch;
  int channels, height, width;
  int rows, columns;  // frequencies per parity, Fh and Fw
};

// The view with `dense` found out.
inline ImageView examined(ImageView view, const Geometry& geometry) {
  const int64_t plane = static_cast<int64_t>(geometry.height) * geometry.width;
  view.dense = view.element == Element::kFloat32 && view.stride[3] == 1 && view.stride[2] == geometry.width &&
               view.stride[1] == plane && view.stride[0] % 4 == 0 && geometry.channels * plane % 4 == 0 &&
               reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return view;
}

// Storage types of 16-bit elements; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
__device__ inline T widen(T value) {
  return value;
}
__device__ inline float widen(BFloat16 value) { return bfloat16_to_float(value.bits); }
__device__ inline float widen(Float16 value) { return half_to_float(value.bits); }

__device__ inline void narrow(double value, double& element) { element = value; }
__device__ inline void narrow(float value, float& element) { element = value; }
__device__ inline void narrow(float value, BFloat16& element) { element.bits = float_to_bfloat16(value); }
__device__ inline void narrow(float value, Float16& element) { element.bits = float_to_half(value); }

// Calls action(pointer to E) with the view's element type E, once, so that loops stand inside the
// choice. Images are computed in T: float64 in float64, all others in float32.
template <class T, class Action>
__device__ inline void with_elements(const ImageView& view, Action action) {
  if constexpr (sizeof(T) == sizeof(double)) {
    action(static_cast<double*>(view.data));
  } else {
    if (view.element == Element::kFloat32)
      action(static_cast<float*>(view.data));
    else if (view.element == Element::kBFloat16)
      action(static_cast<BFloat16*>(view.data));
    else
      action(static_cast<Float16*>(view.data));
  }
}

}  // namespace sgr::cuda
