// Which kernels serve a call, in what order and with what workspace.
#pragma once

#include "fourier_schedule.cuh"
#include "fused_cross_spectrum.cuh"
#include "fused_product.cuh"
#include "staged_schedule.cuh"

namespace sgr::cuda {

enum class Precision { kHighest, kHigh, kMedium };

constexpr int64_t kMaximumPartials = 128;  // of the fused cross spectrum; by shape alone
constexpr int64_t kMaximumGroups = 12;     // of partials that are summed where they arise

// Blocks of the fused kernels for these sizes, 1 or 2; 0 where the staged path must serve.
inline int fused_blocks(const Geometry& geometry) {
  const int largest = std::max({geometry.height, geometry.width, geometry.rows, geometry.columns});
  if (geometry.channels > 4 || largest > 4 * kTile) return 0;
  return largest > 2 * kTile ? 2 : 1;
}

// action(channels, blocks) of a fused kernel; false where the staged path must serve.
template <class Action>
bool with_fused_sizes(const Geometry& geometry, Action action) {
  return with_number<4>(geometry.channels, [&](auto channels) {
    return with_number<2>(fused_blocks(geometry), [&](auto blocks) { return action(channels, blocks); });
  });
}

template <class BASIS, class LAUNCHER>
const uint32_t* basis_tiles(LAUNCHER& launcher, const Geometry& geometry) {
  return launcher.template constants<uint32_t>({BASIS::kKind, geometry.rows, geometry.columns},
                                               [&] { return BASIS::table(geometry.rows, geometry.columns); });
}

template <int CHANNELS, int BLOCKS, bool SYMMETRIC, class LAUNCHER>
const float* launch_arrange(LAUNCHER& launcher, const SpectrumView<float>& spectrum, const Geometry& geometry,
                            float* tiles) {
  constexpr int kThreads = 512, kSlots = SpectrumTiles<CHANNELS, BLOCKS, SYMMETRIC>::kSlots;
  launcher.launch(arrange_spectrum<CHANNELS, BLOCKS, SYMMETRIC>, kSlots / kThreads, 1, kThreads, 16, spectrum, geometry,
                  tiles);
  return tiles;
}

// Words of the arranged spectrum of a symmetric matrix; 0 where the fused kernels do not serve.
inline int64_t arranged_words(const Geometry& geometry) {
  const int64_t tiles = 2 * fused_blocks(geometry), pairs = geometry.channels * (geometry.channels + 1) / 2;
  return tiles == 0 ? 0 : pairs * tiles * tiles * kTileEntries + 4;
}

// Writes arranged_words(geometry) > 0 words, for compute_product's calls to share.
template <class LAUNCHER>
void compute_arranged(LAUNCHER& launcher, const SpectrumView<float>& spectrum, const Geometry& geometry, float* tiles) {
  with_fused_sizes(geometry, [&](auto channels, auto blocks) {
    return launch_arrange<channels, blocks, true>(launcher, spectrum, geometry, tiles) != nullptr;
  });
}

template <class PRECISION, int CHANNELS, bool SYMMETRIC, int BLOCKS, int IMAGES, class LAUNCHER>
bool launch_fused_product(LAUNCHER& launcher, ProductArguments arguments, const SpectrumView<float>& spectrum) {
  using Fused = FusedProduct<PRECISION, CHANNELS, IMAGES, BLOCKS, SYMMETRIC>;
  if (Fused::kSharedBytes > launcher.shared_limit) return false;
  if (!arguments.spectrum)
    arguments.spectrum = launch_arrange<CHANNELS, BLOCKS, SYMMETRIC>(
        launcher, spectrum, arguments.geometry, launcher.template workspace<float>(Fused::Spectrum::kWords));
  arguments.basis = basis_tiles<typename Fused::Basis>(launcher, arguments.geometry);
  const int64_t resident = launcher.resident_blocks(fused_product<Fused>, Fused::kThreads, Fused::kSharedBytes);
  const int64_t blocks = std::min(ceil_divide(arguments.geometry.batch, IMAGES), resident);
  launcher.launch(fused_product<Fused>, blocks, 1, Fused::kThreads, Fused::kSharedBytes, arguments);
  return true;
}

// Several images per block share the constants' way through registers; they are worth it once every multiprocessor has
// a block. A single channel is its own symmetric part.
template <class P, class LAUNCHER>
bool fused_product_of(LAUNCHER& launcher, const ProductArguments& arguments, const SpectrumView<float>& spectrum,
                      bool symmetric) {
  const Geometry& geometry = arguments.geometry;
  return with_fused_sizes(geometry, [&](auto channels, auto blocks) {
    if constexpr (channels == 1) {
      constexpr int kImages = 4 - blocks;
      if (geometry.batch >= kImages * static_cast<int64_t>(launcher.multiprocessors))
        return launch_fused_product<P, 1, true, blocks, kImages>(launcher, arguments, spectrum);
    } else {
      if (!symmetric) return launch_fused_product<P, channels, false, blocks, 1>(launcher, arguments, spectrum);
    }
    return launch_fused_product<P, channels, true, blocks, 1>(launcher, arguments, spectrum);
  });
}

// An accumulation that ends with sums by groups of blocks and those of the images, for `update_covariance`.
struct GroupSums {
  unsigned* arrivals;  // given: kMaximumGroups zeros
  int groups;
  const float *sums, *mean_sums;
};

template <class PRECISION, int CHANNELS, int BLOCKS, class LAUNCHER>
bool launch_fused_cross_spectrum(LAUNCHER& launcher, CrossSpectrumArguments arguments, float* result,
                                 GroupSums* groups) {
  using Fused = FusedCrossSpectrum<PRECISION, CHANNELS, BLOCKS>;
  using Layout = typename Fused::Layout;
  if (Fused::kSharedBytes > launcher.shared_limit) return false;
  const int64_t blocks = std::min(ceil_divide(arguments.geometry.batch, Fused::kImages), kMaximumPartials);
  arguments.partial = launcher.template workspace<float>(blocks * Layout::kEntries);
  arguments.basis = basis_tiles<typename Fused::Basis>(launcher, arguments.geometry);
  if (groups) {
    const Geometry& geometry = arguments.geometry;
    const int64_t pixels = int64_t{CHANNELS} * geometry.height * geometry.width;
    arguments.group = static_cast<int>(ceil_divide(blocks, kMaximumGroups));
    while (arguments.group * arguments.group < blocks) ++arguments.group;
    groups->groups = static_cast<int>(ceil_divide(blocks, arguments.group));
    arguments.arrivals = groups->arrivals;
    arguments.mean_partial = launcher.template workspace<float>(blocks * pixels);
    groups->sums = arguments.sums =
        launcher.template workspace<float>(int64_t{groups->groups} * Layout::kPairs * geometry.rows * geometry.columns);
    groups->mean_sums = arguments.mean_sums = launcher.template workspace<float>(groups->groups * pixels);
  }
  launcher.launch(fused_cross_spectrum<Fused>, blocks, Fused::kParts, Fused::kThreads, Fused::kSharedBytes, arguments);
  if (groups) return true;
  launcher.launch(sum_partial_spectra<CHANNELS, BLOCKS>, Layout::kEntries / kWarp, 1, kWarp * kReductionRows,
                  static_cast<int>(sizeof(double)) * kWarp * kReductionRows,
                  static_cast<const float*>(arguments.partial), static_cast<int>(blocks), arguments.geometry, result);
  return true;
}

template <class PRECISION, class LAUNCHER>
bool fused_cross_spectrum_of(LAUNCHER& launcher, const CrossSpectrumArguments& arguments, float* result,
                             GroupSums* groups) {
  return with_fused_sizes(arguments.geometry, [&](auto channels, auto blocks) {
    return launch_fused_cross_spectrum<PRECISION, channels, blocks>(launcher, arguments, result, groups);
  });
}

// The arithmetic of the general path; bf16 would gain little there, so "medium" is tf32. Calls action with a product of
// that type.
template <class T, class Action>
void with_product_of(Precision precision, Action action) {
  if constexpr (std::is_same_v<T, double>)
    action(WarpProductDouble{});
  else if (precision == Precision::kHighest)
    action(WarpProduct<SplitTensorFloat>{});
  else
    action(WarpProduct<TensorFloat>{});
}

// The operators, on checked arguments; the results of an empty batch are the caller's business.
// v = Sigma g where product.data is not null, q where quadratic is not null; `symmetric` as in quadratic_form;
// `arranged` is null or what compute_arranged wrote, of a symmetric matrix.
template <class T, class LAUNCHER>
void compute_product(LAUNCHER& launcher, const ImageView& gradient, const SpectrumView<T>& spectrum,
                     const float* arranged, const ImageView& product, T* quadratic, bool symmetric, Precision precision,
                     const Geometry& geometry) {
  if constexpr (std::is_same_v<T, float>) {
    if (spectrum.parts == 1) {
      const ProductArguments arguments{
          examined(gradient, geometry), examined(product, geometry), quadratic, arranged, nullptr, geometry};
      constexpr bool (*kFused[])(LAUNCHER&, const ProductArguments&, const SpectrumView<float>&, bool) = {
          fused_product_of<Highest, LAUNCHER>, fused_product_of<High, LAUNCHER>, fused_product_of<Medium, LAUNCHER>};
      if (kFused[static_cast<int>(precision)](launcher, arguments, spectrum, symmetric || arranged)) return;
      if (fourier_product(launcher, {gradient, product, spectrum, geometry}, quadratic, symmetric)) return;
    }
  }
  with_product_of<T>(precision, [&](auto arithmetic) {
    staged_product<decltype(arithmetic)>(launcher, gradient, spectrum, product, quadratic, symmetric, geometry);
  });
}

// bf16 would bias an estimate by 1e-3 of its diagonal, more than sampling noise: "medium" means tf32 here.
template <class LAUNCHER>
bool fused_accumulation(LAUNCHER& launcher, const ImageView& images, Precision precision, float* result,
                        GroupSums* groups, const Geometry& geometry) {
  CrossSpectrumArguments arguments{};
  arguments.perturbation = examined(images, geometry);
  arguments.geometry = geometry;
  return precision == Precision::kHighest ? fused_cross_spectrum_of<Highest>(launcher, arguments, result, groups)
                                          : fused_cross_spectrum_of<High>(launcher, arguments, result, groups);
}

template <class T, class LAUNCHER>
void compute_cross_spectrum(LAUNCHER& launcher, const ImageView& a, const ImageView& b, bool same, int parts,
                            Precision precision, T* result, const Geometry& geometry) {
  if constexpr (std::is_same_v<T, float>) {
    if (same && parts == 1) {
      if (fused_accumulation(launcher, a, precision, result, nullptr, geometry)) return;
    }
  }
  with_product_of<T>(precision, [&](auto arithmetic) {
    staged_cross_spectrum<decltype(arithmetic)>(launcher, a, b, same, parts, result, geometry);
  });
}

}  // namespace sgr::cuda
