// The second kernel of large images: rows of pixels from T.
#pragma once

#include "large_product.cuh"

namespace sgr::cuda {

// v from T: a warp has 16 lines, and blockIdx.y counts runs of kRowTiles tiles of half a line's pixels.
constexpr int kRowTiles = 4;

template <class INVERSE>
__global__ void __launch_bounds__(kLargeThreads, 2) large_rows(const __grid_constant__ LargeArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int l_tiles = tiles_of(geometry.columns), s_tiles = half_tiles(geometry.width);
  const int lines = static_cast<int>(arguments.images) * geometry.channels * geometry.height;
  const int first_line = (static_cast<int>(blockIdx.x) * kLargeWarps + warp) * kTile, pitch = l_tiles * kTile;
  const int first_tile = static_cast<int>(blockIdx.y) * kRowTiles;
  if (first_line >= lines) return;
  const float* source[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    source[i] = arguments.transformed + static_cast<int64_t>(min(first_line + lane_row(lane, i), lines - 1)) * pitch +
                lane_column(lane, 0, 0);
  const int64_t odd = static_cast<int64_t>(lines) * pitch;
  Fragment sum[2][kRowTiles] = {};
#pragma unroll 1
  for (int l_tile = 0; l_tile < l_tiles; ++l_tile)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Fragment t;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 pair = *reinterpret_cast<const float2*>(source[i] + r * odd + kTile * l_tile + 8 * n);
          t.at(n, i, 0) = pair.x, t.at(n, i, 1) = pair.y;
        }
      const typename INVERSE::Tile data = INVERSE::data(t);
      const ConstantLine<INVERSE> constants(arguments.row_inverse, 2 * s_tiles * l_tiles,
                                            (r * s_tiles + first_tile) * l_tiles + l_tile, l_tiles, lane);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (first_tile + i >= s_tiles) continue;
        const typename INVERSE::Constant constant = constants.at(i);
        INVERSE::multiply(sum[r][i], constant, data);
      }
    }

  const int half_width = (geometry.width + 1) / 2;
  const int exponent = halved(geometry.columns) + halved(geometry.rows) - large_spectrum_exponent(arguments);
  const float factor = 1.0f / (static_cast<float>(geometry.rows) * geometry.columns);
  with_elements<float>(arguments.product, [&](auto* data) {
    const int64_t (&stride)[4] = arguments.product.stride;
    const int step = static_cast<int>(stride[3]);
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      const int n = column / 2, j = column % 2, line = first_line + lane_column(lane, n, j);
      const int plane = line / geometry.height;
      if (line >= lines) continue;
      const int64_t image = arguments.first + plane / geometry.channels;
      const PowerOfTwo unscale(exponent - large_image_exponent(arguments, image));
      const float scale = factor * unscale.first;
      auto* centre = kept(data + image * stride[0] + plane % geometry.channels * stride[1] +
                          line % geometry.height * stride[2] + half_width * stride[3]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int s = kTile * (first_tile + i) + lane_row(lane, row);
          const float even = sum[0][i].at(n, row, j), odd = sum[1][i].at(n, row, j);
          if (half_width + s < geometry.width) narrow((even + odd) * scale * unscale.second, centre[s * step]);
          if (s < half_width) narrow((even - odd) * scale * unscale.second, centre[(-1 - s) * step]);
        }
    }
  });
}

}  // namespace sgr::cuda
