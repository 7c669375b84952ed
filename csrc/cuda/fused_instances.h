// The fused kernels are compiled in one file per precision and the Fourier transforms in another, side by side: whoever
// includes this header calls them from there.
#pragma once

#include "launch.h"

namespace sgr::cuda {

extern template bool fused_product_of<Highest>(CudaLauncher&, const ProductArguments&, const SpectrumView<float>&,
                                               bool);
extern template bool fused_product_of<High>(CudaLauncher&, const ProductArguments&, const SpectrumView<float>&, bool);
extern template bool fused_product_of<Medium>(CudaLauncher&, const ProductArguments&, const SpectrumView<float>&, bool);
extern template bool fused_cross_spectrum_of<Highest>(CudaLauncher&, const CrossSpectrumArguments&, float*, GroupSums*);
extern template bool fused_cross_spectrum_of<High>(CudaLauncher&, const CrossSpectrumArguments&, float*, GroupSums*);
extern template bool fourier_product(CudaLauncher&, FourierArguments, float*, bool);

}  // namespace sgr::cuda
