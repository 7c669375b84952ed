// The fused kernels in tf32.
#include "fused_instances.h"

namespace sgr::cuda {
template bool fused_product_of<High>(CudaLauncher&, const ProductArguments&, const SpectrumView<float>&, bool);
template bool fused_cross_spectrum_of<High>(CudaLauncher&, const CrossSpectrumArguments&, float*, GroupSums*);
}  // namespace sgr::cuda
