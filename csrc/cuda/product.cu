// product and quadratic_form on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "fused_instances.h"

namespace sgr::cuda {
namespace {

template <class T>
void compute(const Tensor& gradient, const Tensor& spectrum, const float* arranged, const Tensor* product,
             const Tensor* quadratic, const std::string& precision, const Shape& shape) {
  CudaLauncher launcher(gradient);
  const ImageView target = product ? view_of(*product) : ImageView{nullptr, element_of(gradient), {}};
  T* q = quadratic ? static_cast<T*>(quadratic->mutable_data_ptr()) : nullptr;
  compute_product(launcher, view_of(gradient), spectrum_view<T>(spectrum), arranged, target, q, quadratic != nullptr,
                  parse_precision(precision), geometry_of(shape));
}

void compute(const Tensor& gradient, const Tensor& spectrum, const Tensor* product, const Tensor* quadratic,
             const std::string& precision, const Shape& shape) {
  if (shape.batch == 0) return;
  if (spectrum.scalar_type() == ScalarType::Double)
    compute<double>(gradient, spectrum, nullptr, product, quadratic, precision, shape);
  else
    compute<float>(gradient, spectrum, nullptr, product, quadratic, precision, shape);
}

Tensor product(const Tensor& gradient, const Tensor& spectrum, const std::string& precision) {
  const Shape shape = check_product(gradient, spectrum);
  const Tensor result = allocate(gradient, gradient.sizes());
  compute(gradient, spectrum, &result, nullptr, precision, shape);
  return result;
}

// The spectrum of a symmetric matrix in the fused kernels' order, of images of (height, width) pixels.
void arrange(const Tensor& spectrum, const Tensor& arranged, int64_t height, int64_t width) {
  STD_TORCH_CHECK(
      spectrum.dim() == 4 && spectrum.size(0) == spectrum.size(1) && spectrum.scalar_type() == ScalarType::Float,
      "spectrum: expected float32 of shape (C, C, Fh, Fw), got shape ", shape_of(spectrum));
  const Geometry geometry = geometry_of({1, spectrum.size(0), height, width, spectrum.size(2), spectrum.size(3), 1});
  CudaLauncher launcher(spectrum);
  compute_arranged(launcher, spectrum_view<float>(spectrum), geometry, arranged_of(arranged, spectrum, geometry));
}

std::tuple<Tensor, Tensor> arranged_quadratic_form(const Tensor& gradient, const Tensor& spectrum,
                                                   const Tensor& arranged, bool with_product,
                                                   const std::string& precision) {
  const Shape shape = check_product(gradient, spectrum);
  STD_TORCH_CHECK(shape.parts == 1 && spectrum.scalar_type() == ScalarType::Float,
                  "spectrum: expected float32 of shape (C, C, Fh, Fw), got shape ", shape_of(spectrum));
  const float* tiles = arranged_of(arranged, spectrum, geometry_of(shape));
  const std::vector<int64_t> batch{shape.batch}, nothing{0};
  const Tensor form = allocate(gradient, batch, ScalarType::Float);
  const Tensor result = with_product ? allocate(gradient, gradient.sizes()) : allocate(gradient, nothing);
  if (shape.batch > 0)
    compute<float>(gradient, spectrum, tiles, with_product ? &result : nullptr, &form, precision, shape);
  return {form, result};
}

std::tuple<Tensor, Tensor> quadratic_form(const Tensor& gradient, const Tensor& spectrum, bool with_product,
                                          const std::string& precision) {
  const Shape shape = check_product(gradient, spectrum);
  const std::vector<int64_t> batch{shape.batch}, nothing{0};
  const Tensor form = allocate(gradient, batch, compute_dtype(gradient));
  const Tensor result = with_product ? allocate(gradient, gradient.sizes()) : allocate(gradient, nothing);
  compute(gradient, spectrum, with_product ? &result : nullptr, &form, precision, shape);
  return {form, result};
}

}  // namespace
}  // namespace sgr::cuda

STABLE_TORCH_LIBRARY_IMPL(sgr_kernels, CUDA, m) {
  m.impl("native_product", TORCH_BOX(&sgr::cuda::product));
  m.impl("native_quadratic_form", TORCH_BOX(&sgr::cuda::quadratic_form));
  m.impl("native_arrange", TORCH_BOX(&sgr::cuda::arrange));
  m.impl("native_arranged_quadratic_form", TORCH_BOX(&sgr::cuda::arranged_quadratic_form));
}
