// cross_spectrum on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>

#include "fused_instances.h"

namespace sgr::cuda {
namespace {

template <class T>
void compute(const Tensor& a, const Tensor& b, const Tensor& result, const std::string& precision, const Shape& shape) {
  CudaLauncher launcher(a);
  const ImageView view_a = view_of(a), view_b = view_of(b);
  const bool same = view_a.data == view_b.data && std::equal(view_a.stride, view_a.stride + 4, view_b.stride);
  compute_cross_spectrum(launcher, view_a, view_b, same, static_cast<int>(shape.parts), parse_precision(precision),
                         static_cast<T*>(result.mutable_data_ptr()), geometry_of(shape));
}

Tensor cross_spectrum(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns, bool is_signed,
                      const std::string& precision) {
  const Shape shape = check_cross_spectrum(a, b, rows, columns, is_signed);
  std::vector<int64_t> size{shape.channels, shape.channels, rows, columns};
  if (is_signed) size.insert(size.begin(), 4);
  Tensor result = allocate(a, size, compute_dtype(a));
  if (shape.batch == 0)
    torch::stable::zero_(result);
  else if (a.scalar_type() == ScalarType::Double)
    compute<double>(a, b, result, precision, shape);
  else
    compute<float>(a, b, result, precision, shape);
  return result;
}

}  // namespace
}  // namespace sgr::cuda

STABLE_TORCH_LIBRARY_IMPL(sgr_kernels, CUDA, m) {
  m.impl("native_cross_spectrum", TORCH_BOX(&sgr::cuda::cross_spectrum));
}
