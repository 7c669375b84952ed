// Launches of the kernels that take large images by Fourier transforms.
#pragma once

#include <limits>

#include "fourier_product.cuh"
#include "launcher.cuh"
#include "staged_channels.cuh"

namespace sgr::cuda {

constexpr int64_t kPassBytes = 40 << 20;  // of T, which stays in a large GPU's L2 cache

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

// False where a number of frequencies has no transforms, or a row's pixels lie further apart than 32 bits tell.
template <class LAUNCHER>
bool fourier_product(LAUNCHER& launcher, FourierArguments arguments, float* quadratic, bool symmetric) {
  const Geometry& geometry = arguments.geometry;
  const int row_side = fourier_side(geometry.columns), column_side = fourier_side(geometry.rows);
  if (geometry.channels > 3 || row_side == 0 || column_side == 0) return false;
  for (const ImageView& view : {arguments.gradient, arguments.product})
    if ((geometry.width - 1) * view.stride[3] > std::numeric_limits<int>::max()) return false;
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

}  // namespace sgr::cuda
