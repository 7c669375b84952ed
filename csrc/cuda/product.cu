// product and quadratic_form on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "fused_instances.h"

namespace sgr::cuda {
namespace {

template <class T>
void compute(const Tensor& gradient, const Tensor& spectrum, const Tensor* product, const Tensor* quadratic,
             const std::string& precision, const Shape& shape) {
  CudaLauncher launcher(gradient);
  const ImageView target = product ? view_of(*product) : ImageView{nullptr, element_of(gradient), {}};
  T* q = quadratic ? static_cast<T*>(quadratic->mutable_data_ptr()) : nullptr;
  compute_product(launcher, view_of(gradient), spectrum_view<T>(spectrum), target, q, quadratic != nullptr,
                  parse_precision(precision), geometry_of(shape));
}

void compute(const Tensor& gradient, const Tensor& spectrum, const Tensor* product, const Tensor* quadratic,
             const std::string& precision, const Shape& shape) {
  if (shape.batch == 0) return;
  if (spectrum.scalar_type() == ScalarType::Double)
    compute<double>(gradient, spectrum, product, quadratic, precision, shape);
  else
    compute<float>(gradient, spectrum, product, quadratic, precision, shape);
}

Tensor product(const Tensor& gradient, const Tensor& spectrum, const std::string& precision) {
  const Shape shape = check_product(gradient, spectrum);
  const Tensor result = allocate(gradient, gradient.sizes());
  compute(gradient, spectrum, &result, nullptr, precision, shape);
  return result;
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
}
