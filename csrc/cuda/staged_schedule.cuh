// Launches of the kernels that serve everything: one for each step.
#pragma once

#include "launcher.cuh"
#include "staged_channels.cuh"
#include "staged_transform.cuh"

namespace sgr::cuda {

constexpr int64_t kWorkspaceBytes = 32 << 20;  // what stays in a large GPU's L2 cache

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

}  // namespace sgr::cuda
