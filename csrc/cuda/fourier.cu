// The kernels of large images by Fourier transforms.
#include "fused_instances.h"

namespace sgr::cuda {
template bool fourier_product(CudaLauncher&, FourierArguments, float*, bool);
}  // namespace sgr::cuda
