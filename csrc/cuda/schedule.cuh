// Which kernels serve a call, in what order and with what workspace. LAUNCHER is the machine: CUDA's in
// launch.h, the emulated one in the tests.
//
//   int shared_limit, multiprocessors      bytes of shared memory that a block may have; of the device
//   int64_t resident_blocks(kernel, threads, shared bytes)   blocks that the device holds at a time
//   T* workspace<T>(count)        device memory that lives as long as the launcher
//   const T* constants<T>(key, build)      device memory with the std::vector<T> that build() returns, kept for good
//   launch(kernel, blocks in x, blocks in y, threads, shared bytes, arguments...)
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "fourier_product.cuh"
#include "fused_cross_spectrum.cuh"
#include "fused_product.cuh"
#include "large_columns.cuh"
#include "large_rows.cuh"
#include "staged_channels.cuh"
#include "staged_transform.cuh"

namespace sgr::cuda {

enum class Precision { kHighest, kHigh, kMedium };

constexpr int64_t kPassBytes = 40 << 20;       // of the large images' path
constexpr int64_t kWorkspaceBytes = 32 << 20;  // of the staged path: what stays in a large GPU's L2 cache
constexpr int64_t kMaximumPartials = 128;      // of the fused cross spectrum; by shape alone
constexpr int64_t kMaximumGroups = 12;         // of partials that are summed where they arise

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// action(N), N == number known when this is compiled, if there is one from 1 to MOST; otherwise false.
template <int MOST, class Action>
bool with_number(int number, Action action) {
  if (number == MOST) return action(std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1) return with_number<MOST - 1>(number, action);
  return false;
}

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

template <class PRECISION, int CHANNELS, bool SYMMETRIC, class LAUNCHER>
bool launch_large_product(LAUNCHER& launcher, LargeArguments arguments, float* quadratic) {
  using Columns = LargeColumns<PRECISION, CHANNELS, SYMMETRIC>;
  using Forward = typename PRECISION::Forward;
  using Inverse = typename PRECISION::Inverse;
  const Geometry& geometry = arguments.geometry;
  const int l_tiles = tiles_of(geometry.columns), k_tiles = tiles_of(geometry.rows);
  const int shared = Columns::shared_bytes(half_tiles(geometry.height));
  if (shared > launcher.shared_limit) return false;
  const auto basis = [&](auto format, int64_t kind, int pixels, int frequencies, bool by_frequency, bool as_data) {
    using Format = decltype(format);
    return launcher.template constants<uint32_t>({4 * Format::kKind + kind, pixels, frequencies}, [&] {
      return large_basis<Format>(pixels, frequencies, by_frequency, as_data);
    });
  };
  arguments.row_forward = basis(Forward{}, 0, geometry.width, geometry.columns, true, false);
  arguments.column_forward = basis(Forward{}, 1, geometry.height, geometry.rows, true, true);
  arguments.column_inverse = basis(Inverse{}, 2, geometry.height, geometry.rows, false, false);
  arguments.row_inverse = basis(Inverse{}, 2, geometry.width, geometry.columns, false, false);
  const int64_t pairs = SYMMETRIC ? CHANNELS * (CHANNELS + 1) / 2 : CHANNELS * CHANNELS;
  const int64_t magnitudes = kMagnitudeBlocks + geometry.batch * kImageBlocks;
  arguments.magnitudes = launcher.template workspace<unsigned>(magnitudes);
  arguments.spectrum_tiles = launcher.template workspace<float>(pairs * l_tiles * k_tiles * kTileEntries);
  if (quadratic) arguments.partial = launcher.template workspace<double>(geometry.batch * l_tiles);
  launcher.launch(largest_magnitudes<CHANNELS>, magnitudes, 1, kLargeThreads, 16, arguments);
  launcher.launch(arrange_large_spectrum<CHANNELS, SYMMETRIC>, l_tiles * k_tiles, 1, kTileEntries, 0, arguments);

  // T of a pass stays in a large GPU's L2 cache.
  const bool inverse = arguments.product.data != nullptr;
  const int64_t per_image = int64_t{2} * CHANNELS * geometry.height * l_tiles * kTile;
  const int64_t most = std::max<int64_t>(1, kPassBytes / sizeof(float) / per_image);
  const int64_t passes = inverse ? ceil_divide(geometry.batch, most) : 1;
  const int64_t images = ceil_divide(geometry.batch, passes);
  if (inverse) arguments.transformed = launcher.template workspace<float>(images * per_image);
  for (arguments.first = 0; arguments.first < geometry.batch; arguments.first += images) {
    arguments.images = std::min(images, geometry.batch - arguments.first);
    launcher.launch(large_columns<Columns>, arguments.images * l_tiles, 1, kLargeThreads, shared, arguments);
    if (inverse)
      launcher.launch(large_rows<typename PRECISION::Inverse>,
                      ceil_divide(arguments.images * CHANNELS * geometry.height, kLargeWarps * kTile),
                      ceil_divide(half_tiles(geometry.width), kRowTiles), kLargeThreads, 0, arguments);
  }
  if (quadratic)
    launcher.launch(sum_quadratic<float>, geometry.batch, 1, kWarp, 0, static_cast<const double*>(arguments.partial),
                    static_cast<int64_t>(l_tiles), quadratic);
  return true;
}

template <class P, class LAUNCHER>
bool large_product_of(LAUNCHER& launcher, const LargeArguments& arguments, float* quadratic, bool symmetric) {
  return with_number<3>(arguments.geometry.channels, [&](auto channels) {
    if constexpr (channels > 1)
      if (!symmetric) return launch_large_product<P, channels, false>(launcher, arguments, quadratic);
    return launch_large_product<P, channels, true>(launcher, arguments, quadratic);
  });
}

using FourierKernel = void (*)(FourierArguments);

// Forward and back.
template <class Element>
std::array<FourierKernel, 2> fourier_row_kernels(int side) {
  if (side == 8) return {fourier_rows<8, Element>, fourier_rows_back<8, Element>};
  return {fourier_rows<4, Element>, fourier_rows_back<4, Element>};
}

// What arranges the spectrum, and what takes columns.
template <int SIDE>
std::array<FourierKernel, 2> fourier_column_kernels(int channels, bool symmetric) {
  std::array<FourierKernel, 2> kernels;
  with_number<3>(channels, [&](auto number) {
    kernels = {arrange_fourier_spectrum<SIDE, number, true>, fourier_columns<SIDE, number, true>};
    if constexpr (number > 1)
      if (!symmetric) kernels = {arrange_fourier_spectrum<SIDE, number, false>, fourier_columns<SIDE, number, false>};
    return true;
  });
  return kernels;
}

// Serves whatever has transforms. Microseconds that an H100 issues instructions for, or its tensor cores are busy, by
// these and by the products of matrices below (sgr bench cuda-static): of 64 images of three channels 20 and 20 at 96
// pixels, 35 and 35 at 128, 57 and 68 at 160, 79 and 104 at 192, 114 and 152 at 224; of 8 images 29 and 66 at 320, 41
// and 112 at 384, 70 and 272 at 512.
template <class LAUNCHER>
bool fourier_product(LAUNCHER& launcher, FourierArguments arguments, float* quadratic, bool symmetric) {
  const Geometry& geometry = arguments.geometry;
  const int row_side = fourier_side(geometry.columns), column_side = fourier_side(geometry.rows);
  if (geometry.channels > 3 || row_side == 0 || column_side == 0) return false;
  const auto axis = [&](int pixels, int frequencies, int side) {
    const auto build = [&] { return fourier_twiddles(frequencies, side); };
    return fourier_axis(pixels, frequencies, side, launcher.template constants<float>({-1, frequencies, side}, build));
  };
  arguments.row = axis(geometry.width, geometry.columns, row_side);
  arguments.column = axis(geometry.height, geometry.rows, column_side);
  const int row_threads = kWarp * arguments.row.radix, column_threads = kWarp * arguments.column.radix;
  const int row_shared = fourier_shared_bytes(row_side, kRowSets * arguments.row.radix);
  const int column_shared = fourier_shared_bytes(column_side, geometry.channels * arguments.column.radix) +
                            static_cast<int>(sizeof(double)) * kMostRadix;
  if (column_shared > launcher.shared_limit) return false;
  const auto [rows, rows_back] = arguments.gradient.element == Element::kFloat32 ? fourier_row_kernels<float>(row_side)
                                 : arguments.gradient.element == Element::kBFloat16
                                     ? fourier_row_kernels<BFloat16>(row_side)
                                     : fourier_row_kernels<Float16>(row_side);
  const auto [arrange, columns] = column_side == 8 ? fourier_column_kernels<8>(geometry.channels, symmetric)
                                                   : fourier_column_kernels<4>(geometry.channels, symmetric);

  const int groups = 2 * geometry.columns * column_side / kWarp;  // of columns, that a block takes
  const int64_t pairs = geometry.channels * (symmetric ? geometry.channels + 1 : 2 * geometry.channels) / 2;
  arguments.arranged = launcher.template workspace<float4>(pairs * geometry.rows * geometry.columns / 4);
  if (quadratic) arguments.partial = launcher.template workspace<double>(geometry.batch * groups);
  launcher.launch(arrange, groups * (column_side / 4), 1, kWarp * ((arguments.column.radix + 1) / 2), 0, arguments);

  // T of a pass stays in a large GPU's L2 cache.
  const bool inverse = arguments.product.data != nullptr;
  const int rows_of_block = kWarp / row_side * kRowSets;
  const int64_t row_blocks = ceil_divide(geometry.height, rows_of_block);
  arguments.pitch = static_cast<int>(row_blocks) * rows_of_block;
  const int64_t per_image = int64_t{geometry.channels} * geometry.columns * arguments.pitch;
  const int64_t most = std::max<int64_t>(1, kPassBytes / sizeof(Complex) / per_image);
  const int64_t images = ceil_divide(geometry.batch, ceil_divide(geometry.batch, most));
  arguments.transformed = launcher.template workspace<Complex>(images * per_image);
  for (; arguments.first < geometry.batch; arguments.first += images) {
    const int64_t here = std::min(images, geometry.batch - arguments.first), planes = here * geometry.channels;
    launcher.launch(rows, row_blocks, planes, row_threads, row_shared, arguments);
    launcher.launch(columns, groups, here, column_threads, column_shared, arguments);
    if (inverse) launcher.launch(rows_back, row_blocks, planes, row_threads, row_shared, arguments);
  }
  if (quadratic)
    launcher.launch(sum_quadratic<float>, geometry.batch, 1, kWarp, 0, static_cast<const double*>(arguments.partial),
                    static_cast<int64_t>(groups), quadratic);
  return true;
}

template <class PRODUCT, class LAUNCHER>
struct Staged {
  using T = typename PRODUCT::Number;
  LAUNCHER& launcher;
  Geometry geometry;
  int64_t chunk;  // images at a time
  T *row_analysis, *column_analysis, *half_transformed;

  // `coefficient_sets` counts the sets of coefficients of all parities that live at a time.
  Staged(LAUNCHER& machine, const Geometry& sizes, int coefficient_sets) : launcher(machine), geometry(sizes) {
    const int64_t half = 2 * std::max(static_cast<int64_t>(geometry.columns) * geometry.height,
                                      static_cast<int64_t>(geometry.width) * geometry.rows);
    const int64_t per_image = geometry.channels * (half + coefficient_sets * 4 * plane());
    chunk = std::max<int64_t>(1, std::min<int64_t>(geometry.batch, kWorkspaceBytes / sizeof(T) / per_image));
    row_analysis = basis(geometry.width, geometry.columns, true);
    column_analysis = basis(geometry.height, geometry.rows, true);
    half_transformed = launcher.template workspace<T>(chunk * geometry.channels * half);
  }

  int64_t plane() const { return static_cast<int64_t>(geometry.rows) * geometry.columns; }

  Coefficients<T> coefficients() const {
    T* data = launcher.template workspace<T>(chunk * geometry.channels * 4 * plane());
    return {data, chunk, geometry.channels, plane()};
  }

  T* basis(int pixels, int frequencies, bool by_frequency) const {
    const int64_t half_size = static_cast<int64_t>((pixels + 1) / 2) * frequencies;
    T* memory = launcher.template workspace<T>(2 * half_size);
    launcher.launch(fill_basis<T>, ceil_divide(half_size, kStagedThreads), 1, kStagedThreads, 0, memory, pixels,
                    frequencies, by_frequency);
    return memory;
  }

  template <class SOURCE>
  void launch_analysis(const SOURCE& source, const T* basis, T* output, int64_t count, int rows, int pixels,
                       int frequencies) const {
    launcher.launch(analyse<PRODUCT, SOURCE>, ceil_divide(frequencies, kSide) * ceil_divide(count, kSide), 1,
                    kStagedThreads, static_cast<int>(sizeof(T)) * kStagedShared, source, basis, output, count, rows,
                    pixels, frequencies);
  }

  template <class TARGET>
  void launch_synthesis(const T* input, const T* basis, const TARGET& target, int64_t count, int64_t inner_count,
                        int pixels, int frequencies) const {
    launcher.launch(synthesise<PRODUCT, TARGET>, ceil_divide((pixels + 1) / 2, kSide) * ceil_divide(count, kSide), 1,
                    kStagedThreads, static_cast<int>(sizeof(T)) * kStagedShared, input, basis, target, count,
                    inner_count, pixels, frequencies);
  }

  // Z of the images from `first` on; fewer than a chunk at the end.
  void analysis(const ImageView& images, int64_t first, Coefficients<T>& z) const {
    z.images = std::min(chunk, geometry.batch - first);
    const int64_t planes = z.images * geometry.channels;
    const ImageRows<T> source{images, geometry.channels, geometry.height, first};
    launch_analysis(source, static_cast<const T*>(row_analysis), half_transformed, planes * geometry.height,
                    geometry.height, geometry.width, geometry.columns);
    const DenseRows<T> middle{half_transformed, geometry.height};
    launch_analysis(middle, static_cast<const T*>(column_analysis), z.data, 2 * planes * geometry.columns,
                    geometry.columns, geometry.height, geometry.rows);
  }

  void synthesis(const Coefficients<T>& y, const T* row_basis, const T* column_basis, const ImageView& images,
                 int64_t first) const {
    const int64_t planes = y.images * geometry.channels;
    const DenseColumns<T> middle{half_transformed, geometry.rows, geometry.width};
    launch_synthesis(static_cast<const T*>(y.data), row_basis, middle, 2 * planes * geometry.rows,
                     planes * geometry.rows, geometry.width, geometry.columns);
    const ImageColumns target{images, geometry.channels, geometry.width, first};
    launch_synthesis(static_cast<const T*>(half_transformed), column_basis, target, planes * geometry.width,
                     planes * geometry.width, geometry.height, geometry.rows);
  }
};

template <class PRODUCT, class T, class LAUNCHER>
void staged_product(LAUNCHER& launcher, const ImageView& gradient, const SpectrumView<T>& spectrum,
                    const ImageView& product, T* quadratic, bool symmetric, const Geometry& geometry) {
  constexpr int kThreads = 256;
  const bool inverse = product.data != nullptr;
  const Staged<PRODUCT, LAUNCHER> stages(launcher, geometry, inverse ? 2 : 1);
  Coefficients<T> z = stages.coefficients();
  Coefficients<T> y = inverse ? stages.coefficients() : Coefficients<T>{};
  const T* row_basis = inverse ? stages.basis(geometry.width, geometry.columns, false) : nullptr;
  const T* column_basis = inverse ? stages.basis(geometry.height, geometry.rows, false) : nullptr;
  const int64_t parts = geometry.channels * ceil_divide(stages.plane(), kThreads);  // of an image's q
  double* partial = quadratic ? launcher.template workspace<double>(stages.chunk * parts) : nullptr;
  for (int64_t first = 0; first < geometry.batch; first += stages.chunk) {
    stages.analysis(gradient, first, z);
    y.images = z.images;
    launcher.launch(symmetric ? mix_channels<T, true> : mix_channels<T, false>, z.images * parts, 1, kThreads,
                    static_cast<int>(sizeof(double)) * kThreads / kWarp, z, spectrum, geometry.columns, y, partial);
    if (quadratic)
      launcher.launch(sum_quadratic<T>, z.images, 1, kWarp, 0, static_cast<const double*>(partial), parts,
                      quadratic + first);
    if (inverse) stages.synthesis(y, row_basis, column_basis, product, first);
  }
}

template <class PRODUCT, class T, class LAUNCHER>
void staged_cross_spectrum(LAUNCHER& launcher, const ImageView& a, const ImageView& b, bool same, int parts, T* result,
                           const Geometry& geometry) {
  constexpr int kThreads = 256;
  const Staged<PRODUCT, LAUNCHER> stages(launcher, geometry, same ? 1 : 2);
  Coefficients<T> za = stages.coefficients();
  Coefficients<T> zb = same ? za : stages.coefficients();
  const int64_t entries = static_cast<int64_t>(parts) * geometry.channels * geometry.channels * stages.plane();
  for (int64_t first = 0; first < geometry.batch; first += stages.chunk) {
    stages.analysis(a, first, za);
    if (!same) stages.analysis(b, first, zb);
    launcher.launch(correlate_channels<T>, ceil_divide(entries, kThreads), 1, kThreads, 0, za, same ? za : zb, parts,
                    first > 0, result);
  }
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
      const LargeArguments large{examined(gradient, geometry), product, spectrum, geometry};
      constexpr bool (*kLarge[])(LAUNCHER&, const LargeArguments&, float*, bool) = {
          large_product_of<Highest, LAUNCHER>, large_product_of<High, LAUNCHER>, large_product_of<Medium, LAUNCHER>};
      if (kLarge[static_cast<int>(precision)](launcher, large, quadratic, symmetric)) return;
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
