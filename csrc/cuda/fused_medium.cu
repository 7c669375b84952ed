// The fused kernels in bf16; estimates of covariances have none.
#include "fused_instances.h"

namespace sgr::cuda {
template bool fused_product_of<Medium>(CudaLauncher&, const ProductArguments&, const SpectrumView<float>&, bool);
}  // namespace sgr::cuda
