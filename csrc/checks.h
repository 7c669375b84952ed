// Argument checks of the compiled operators. The public functions have checked before; these guard the
// memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <string>

#include "plan.h"

namespace sgr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ')';
  return out.str();
}

// The dtype in which a tensor's operators compute, and in which spectra are given.
inline ScalarType compute_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_images(const char* name, const Tensor& images) {
  const ScalarType dtype = images.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  name, ": expected float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0, name,
                  ": expected shape (B, C, H, W) with C, H, W >= 1, got ", shape_of(images));
}

inline void check_frequencies(const Shape& shape) {
  STD_TORCH_CHECK(2 * shape.rows >= shape.height && 2 * shape.columns >= shape.width,
                  "expected at least half as many frequencies as pixels along each axis, got ", shape.rows,
                  " x ", shape.columns, " for ", shape.height, " x ", shape.width, " pixels");
}

// Sizes of product(gradient, spectrum) and quadratic_form(gradient, spectrum).
inline Shape check_product(const Tensor& gradient, const Tensor& spectrum) {
  check_images("gradient", gradient);
  STD_TORCH_CHECK(spectrum.scalar_type() == compute_dtype(gradient), "spectrum: expected ",
                  torch::headeronly::toString(compute_dtype(gradient)), " for this gradient, got ",
                  torch::headeronly::toString(spectrum.scalar_type()));
  STD_TORCH_CHECK(spectrum.device() == gradient.device(), "spectrum and gradient: expected one device");
  STD_TORCH_CHECK(
      spectrum.dim() == 4 && spectrum.size(0) == gradient.size(1) && spectrum.size(1) == gradient.size(1),
      "spectrum: expected shape (C, C, Fh, Fw) with C = ", gradient.size(1), ", got ", shape_of(spectrum));
  const Shape shape{gradient.size(0), gradient.size(1), gradient.size(2),
                    gradient.size(3), spectrum.size(2), spectrum.size(3)};
  check_frequencies(shape);
  return shape;
}

// Sizes of cross_spectrum(a, b, rows, columns).
inline Shape check_cross_spectrum(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns) {
  check_images("a", a);
  check_images("b", b);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(),
                  "a and b: expected one dtype and device");
  STD_TORCH_CHECK(shape_of(a) == shape_of(b), "b: expected the shape of a, ", shape_of(a), ", got ",
                  shape_of(b));
  const Shape shape{a.size(0), a.size(1), a.size(2), a.size(3), rows, columns};
  check_frequencies(shape);
  return shape;
}

}  // namespace sgr
