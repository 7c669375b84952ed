// A running covariance's update on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>

#include "fused_instances.h"
#include "update_schedule.cuh"

namespace sgr::cuda {
namespace {

// Memory of a state's tensor: dense, of a dtype and a shape.
template <class T>
T* state_of(const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  bool fits = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t stride = 1;
  for (int64_t i = tensor.dim() - 1; fits && i >= 0; --i) {
    fits = tensor.size(i) == shape[i] && (shape[i] == 1 || tensor.stride(i) == stride);
    stride *= shape[i];
  }
  STD_TORCH_CHECK(fits, name, ": expected dense ", torch::headeronly::toString(dtype), " of the estimate's shape, got ",
                  torch::headeronly::toString(tensor.scalar_type()), " of shape ", shape_of(tensor));
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Binning parse_binning(const std::string& binning) {
  if (binning == "rounded") return Binning::kRounded;
  if (binning == "linear") return Binning::kLinear;
  STD_TORCH_CHECK(binning == "even", "binning: expected 'rounded', 'linear' or 'even', got '", binning, "'");
  return Binning::kEven;
}

void update(const Tensor& perturbation, const Tensor& values, const Tensor& mean, const Tensor& scale,
            const Tensor& table, const Tensor& spectrum, const Tensor& updates, const Tensor& skipped,
            const Tensor& arrivals, const Tensor& arranged, const std::string& binning, double decay,
            double target_variance, bool clip, const std::string& precision) {
  check_images("perturbation", perturbation);
  const int64_t channels = perturbation.size(1), height = perturbation.size(2), width = perturbation.size(3);
  STD_TORCH_CHECK(perturbation.size(0) > 0 && channels <= 4 && height <= 64 && width <= 64 &&
                      perturbation.scalar_type() != ScalarType::Double,
                  "perturbation: expected images of up to 4 channels and 64 x 64 pixels, below float64, got shape ",
                  shape_of(perturbation));
  Estimate estimate{};
  estimate.binning = parse_binning(binning);
  const bool even = estimate.binning == Binning::kEven;
  const auto extent = [](const Tensor& tensor, int64_t axis) {
    STD_TORCH_CHECK(axis < tensor.dim() && tensor.size(axis) > 0 && tensor.size(axis) <= 128,
                    "state: expected extents of at most 128, got shape ", shape_of(tensor));
    return static_cast<int>(tensor.size(axis));
  };
  for (int axis = 0; axis < 2; ++axis) {
    estimate.bins[axis] = axis == 0 || even ? extent(values, 2 + axis) : 1;
    estimate.table_size[axis] = extent(table, 2 + axis);
    estimate.spectrum_size[axis] = extent(spectrum, 2 + axis);
    STD_TORCH_CHECK(estimate.table_size[axis] <= perturbation.size(2 + axis) &&
                        (!clip || estimate.table_size[axis] == perturbation.size(2 + axis)) &&
                        (!even || estimate.bins[axis] <= perturbation.size(2 + axis)),
                    "table: expected displacements within the image, got shape ", shape_of(table));
  }
  const auto matrices = [&](const int (&size)[2]) {
    return std::vector<int64_t>{channels, channels, size[0], size[1]};
  };
  std::vector<int64_t> values_shape = matrices(estimate.bins);
  if (!even) values_shape.pop_back();
  const std::vector<int64_t> one, groups{kMaximumGroups};
  estimate.values = state_of<float>("values", values, ScalarType::Float, values_shape);
  estimate.mean = state_of<float>("mean", mean, ScalarType::Float, {channels, height, width});
  estimate.scale = state_of<float>("scale", scale, ScalarType::Float, one);
  estimate.table = state_of<float>("table", table, ScalarType::Float, matrices(estimate.table_size));
  estimate.spectrum = state_of<float>("spectrum", spectrum, ScalarType::Float, matrices(estimate.spectrum_size));
  estimate.updates = state_of<int64_t>("updates", updates, ScalarType::Long, one);
  estimate.skipped = state_of<int64_t>("skipped", skipped, ScalarType::Long, one);
  estimate.arrivals = state_of<unsigned>("arrivals", arrivals, ScalarType::Int, groups);
  for (const Tensor* state : {&values, &mean, &scale, &table, &spectrum, &updates, &skipped, &arrivals})
    STD_TORCH_CHECK(state->device() == perturbation.device(), "state: expected the perturbation's device");
  estimate.decay = decay;
  estimate.target_variance = target_variance;
  estimate.clip = clip;
  CudaLauncher launcher(perturbation);
  const Geometry geometry = geometry_of(
      {perturbation.size(0), channels, height, width, estimate.spectrum_size[0], estimate.spectrum_size[1], 1});
  if (arranged.size(0) > 0) estimate.arranged = arranged_of(arranged, spectrum, geometry);
  STD_TORCH_CHECK(compute_update(launcher, view_of(perturbation), estimate, parse_precision(precision), geometry),
                  "perturbation: expected images whose transforms fit the GPU's shared memory, got shape ",
                  shape_of(perturbation));
}

}  // namespace
}  // namespace sgr::cuda

STABLE_TORCH_LIBRARY_IMPL(sgr_kernels, CUDA, m) { m.impl("native_update", TORCH_BOX(&sgr::cuda::update)); }
