// The fused kernels of float32 accuracy: three products of fp16 halves.
#include "fused_instances.h"

namespace sgr::cuda {
template bool fused_product_of<Highest>(CudaLauncher&, const ProductArguments&, const SpectrumView<float>&, bool);
template bool fused_cross_spectrum_of<Highest>(CudaLauncher&, const CrossSpectrumArguments&, float*, GroupSums*);
}  // namespace sgr::cuda
