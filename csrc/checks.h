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
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, ": expected float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0, name,
                  ": expected shape (B, C, H, W) with C, H, W >= 1, got ", shape_of(images));
}

inline void check_frequencies(const Shape& shape) {
  STD_TORCH_CHECK(2 * shape.rows >= shape.height && 2 * shape.columns >= shape.width,
                  "frequencies: expected at least half as many as pixels along each axis, got ", shape.rows, " x ",
                  shape.columns, " for ", shape.height, " x ", shape.width, " pixels");
}

// Sizes of product(gradient, spectrum) and quadratic_form(gradient, spectrum).
inline Shape check_product(const Tensor& gradient, const Tensor& spectrum) {
  check_images("gradient", gradient);
  STD_TORCH_CHECK(spectrum.scalar_type() == compute_dtype(gradient), "spectrum: expected ",
                  torch::headeronly::toString(compute_dtype(gradient)), " for this gradient, got ",
                  torch::headeronly::toString(spectrum.scalar_type()));
  STD_TORCH_CHECK(spectrum.device() == gradient.device(), "spectrum: expected the gradient's device");
  const int64_t channels = gradient.size(1), leading = spectrum.dim() - 4;
  STD_TORCH_CHECK((leading == 0 || (leading == 1 && spectrum.size(0) == 4)) && spectrum.size(leading) == channels &&
                      spectrum.size(leading + 1) == channels,
                  "spectrum: expected shape (C, C, Fh, Fw) or (4, C, C, Fh, Fw) with C = ", channels, ", got ",
                  shape_of(spectrum));
  Shape shape;
  shape.batch = gradient.size(0);
  shape.channels = channels;
  shape.height = gradient.size(2);
  shape.width = gradient.size(3);
  shape.rows = spectrum.size(leading + 2);
  shape.columns = spectrum.size(leading + 3);
  shape.parts = leading == 0 ? 1 : 4;
  check_frequencies(shape);
  return shape;
}

// Sizes of cross_spectrum(a, b, rows, columns, signed).
inline Shape check_cross_spectrum(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns, bool is_signed) {
  check_images("a", a);
  check_images("b", b);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "b: expected the dtype of a, ",
                  torch::headeronly::toString(a.scalar_type()), ", got ", torch::headeronly::toString(b.scalar_type()));
  STD_TORCH_CHECK(a.device() == b.device(), "b: expected the device of a");
  STD_TORCH_CHECK(shape_of(a) == shape_of(b), "b: expected the shape of a, ", shape_of(a), ", got ", shape_of(b));
  const Shape shape{a.size(0), a.size(1), a.size(2), a.size(3), rows, columns, is_signed ? 4 : 1};
  check_frequencies(shape);
  return shape;
}

}  // namespace sgr
