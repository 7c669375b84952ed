// The first kernel of large images: from pixels to T, a block of threads for an image and 16 column frequencies.
#pragma once

#include "large_product.cuh"

namespace sgr::cuda {

template <class PRECISION, int CHANNELS, bool SYMMETRIC>
struct LargeColumns {
  using Forward = typename PRECISION::Forward;
  using Inverse = typename PRECISION::Inverse;
  static constexpr int kExchangeTiles = kParities * 2 * CHANNELS;  // two k tiles of Y, or two t tiles of T
  static int shared_bytes(int t_tiles) {
    return 4 * kTileEntries * (kParities * CHANNELS * t_tiles + kExchangeTiles) + 4 * kLargeWarps;
  }

  const LargeArguments& arguments;
  uint32_t* transformed;  // U: [parity][channel][t tile]
  uint32_t* exchange;     // Y or T: [parity][one of two tiles][channel]
  float* forms;
  int warp, lane, l_tile, l_tiles, k_tiles, t_tiles, s_tiles;
  int64_t image;  // of this pass

  __device__ LargeColumns(const LargeArguments& a, unsigned char* shared) : arguments(a) {
    const Geometry& geometry = a.geometry;
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    l_tiles = tiles_of(geometry.columns);
    k_tiles = tiles_of(geometry.rows);
    t_tiles = half_tiles(geometry.height);
    s_tiles = half_tiles(geometry.width);
    image = blockIdx.x / l_tiles;
    l_tile = blockIdx.x % l_tiles;
    transformed = reinterpret_cast<uint32_t*>(shared);
    exchange = transformed + kParities * CHANNELS * t_tiles * kTileEntries;
    forms = reinterpret_cast<float*>(exchange + kExchangeTiles * kTileEntries);
  }

  __device__ uint32_t* transformed_tile(int parity, int channel, int t) const {
    return transformed + ((parity * CHANNELS + channel) * t_tiles + t) * kTileEntries;
  }

  // Where the lines of a t tile begin at the right of the centre, [i][below the centre]. What lies outside of the half
  // image meets constants that are zero, so that a pixel at its edge may stand for it.
  template <class Element>
  struct Lines {
    const Element* start[2][2];
    float lower_scale[2];  // 0 for the middle line of an odd number, which has no mirror image
  };
  template <class Element>
  __device__ Lines<Element> lines_of(const Element* plane, int t_tile, float scale) const {
    const Geometry& geometry = arguments.geometry;
    const int half_height = (geometry.height + 1) / 2, half_width = (geometry.width + 1) / 2;
    const int64_t line = arguments.gradient.stride[2], step = arguments.gradient.stride[3];
    Lines<Element> lines;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = min(kTile * t_tile + lane_row(lane, i), half_height - 1);
      const bool has_lower = half_height + t < geometry.height;
      lines.start[i][0] = kept(plane + (half_height - 1 - t) * line + half_width * step);
      lines.start[i][1] = kept(plane + (has_lower ? half_height + t : half_height - 1 - t) * line + half_width * step);
      lines.lower_scale[i] = has_lower ? scale : 0.0f;
    }
    return lines;
  }

  // X of the parities, times scale: rows t, columns s. PAIRS: where two columns are one aligned access.
  template <bool PAIRS, class Element>
  __device__ void read_tile(Fragment (&x)[kParities], const Lines<Element>& lines, int s_tile, float scale) const {
    const Geometry& geometry = arguments.geometry;
    const int half_width = (geometry.width + 1) / 2;
    const int step = static_cast<int>(arguments.gradient.stride[3]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int first = min(kTile * s_tile + lane_column(lane, n, 0), half_width - (PAIRS ? 2 : 1));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float right[2][2], left[2][2];  // [lower][j]
#pragma unroll
        for (int low = 0; low < 2; ++low) {
          const Element* start = lines.start[i][low];
          if constexpr (PAIRS) {
            const float2 right_pair = *reinterpret_cast<const float2*>(start + first);
            const float2 left_pair = *reinterpret_cast<const float2*>(start - 2 - first);
            right[low][0] = right_pair.x, right[low][1] = right_pair.y;
            left[low][0] = left_pair.y, left[low][1] = left_pair.x;
          } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int s = min(first + j, half_width - 1);
              left[low][j] = widen(start[(-1 - s) * step]);
              right[low][j] = half_width + s < geometry.width ? widen(start[s * step]) : 0.0f;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float lower_even = (right[1][j] + left[1][j]) * lines.lower_scale[i];
          const float lower_odd = (right[1][j] - left[1][j]) * lines.lower_scale[i];
          const float upper_even = right[0][j] + left[0][j], upper_odd = right[0][j] - left[0][j];
          x[0].at(n, i, j) = lower_even + upper_even * scale;
          x[1].at(n, i, j) = lower_odd + upper_odd * scale;
          x[2].at(n, i, j) = lower_even - upper_even * scale;
          x[3].at(n, i, j) = lower_odd - upper_odd * scale;
        }
      }
    }
  }

  // U of all parities, channels and rows into shared memory, as first operands.
  __device__ void transform_rows() const {
    const ImageView& view = arguments.gradient;
    if (view.dense && arguments.geometry.width % 4 == 0)
      return transform_rows<true>(static_cast<const float*>(view.data));
    with_elements<float>(view, [&](const auto* data) { transform_rows<false>(data); });
  }
  template <bool PAIRS, class Element>
  __device__ void transform_rows(const Element* data) const {
    const int64_t sample = arguments.first + image;
    const float scale = power_of_two(large_image_exponent(arguments, sample));
    const float half_scale = power_of_two(-halved(arguments.geometry.columns));
    const ConstantLine<Forward> constants[2] = {
        {arguments.row_forward, 2 * l_tiles * s_tiles, l_tile * s_tiles, 1, lane},
        {arguments.row_forward, 2 * l_tiles * s_tiles, (l_tiles + l_tile) * s_tiles, 1, lane}};
#pragma unroll 1
    for (int task = warp; task < CHANNELS * t_tiles; task += kLargeWarps) {
      const int channel = task % CHANNELS, t = task / CHANNELS;
      const Element* plane = data + sample * arguments.gradient.stride[0] + channel * arguments.gradient.stride[1];
      const Lines<Element> lines = lines_of(plane, t, scale);
      Fragment sum[kParities] = {};
#pragma unroll 1
      for (int s = 0; s < s_tiles; ++s) {
        Fragment x[kParities];
        read_tile<PAIRS>(x, lines, s, scale);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const typename Forward::Constant constant = constants[r].at(s);
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            Fragment product{};
            Forward::multiply(product, constant, Forward::data(x[2 * p + r]));
            sum[2 * p + r] += product;
          }
        }
      }
#pragma unroll
      for (int parity = 0; parity < kParities; ++parity) {
        sum[parity] *= half_scale;
        store_tile(as_matrix(Forward::data(sum[parity])), transformed_tile(parity, channel, t), lane);
      }
    }
  }

  // Y of a parity and one k tile, into shared memory; the lane's part of z' Lambda z is returned.
  __device__ float mix(int parity, int k, uint32_t* target) const {
    Fragment z[CHANNELS] = {}, y[CHANNELS] = {};
    const ConstantLine<Forward> constants(arguments.column_forward, 2 * k_tiles * t_tiles,
                                          ((parity >> 1) * k_tiles + k) * t_tiles, 1, lane);
#pragma unroll 1
    for (int t = 0; t < t_tiles; ++t) {
      const typename Forward::Constant constant = constants.at(t);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        typename Forward::Tile u;
        load_tile(u, transformed_tile(parity, c, t), lane);
        Fragment product{};
        Forward::multiply(product, u, constant);
        z[c] += product;
      }
    }
    const float* tile = arguments.spectrum_tiles + (l_tile * k_tiles + k) * kTileEntries;
    float form = 0.0f;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
        const Fragment lambda = load_fragment(tile, lane);
        tile += static_cast<int64_t>(l_tiles) * k_tiles * kTileEntries;
        y[c].add_product(lambda, z[d]);
        if (SYMMETRIC && c != d) y[d].add_product(lambda, z[c]);
      }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
      for (int e = 0; e < kLaneEntries; ++e) form += y[c].value[e] * z[c].value[e];
      store_tile(Inverse::data(y[c]), target + c * kTileEntries, lane);
    }
    return form;
  }

  __device__ void run() const {
    const bool inverse = arguments.product.data != nullptr;
    transform_rows();
    // Taller images have T in several turns, and Y anew in each.
    float form = 0.0f;
    for (int first = 0; first < t_tiles && (inverse || first == 0); first += kLargeTiles) {
      const float again = transform_columns(first, inverse);
      if (first == 0) form = again;
    }
    if (!arguments.partial) return;
    form = warp_sum(form);
    if (lane == 0) forms[warp] = form;
    __syncthreads();
    write_quadratic();
  }

 private:
  // T of the t tiles from `first` on; the lane's part of z' Lambda z is returned. Each step brings two k tiles of Y,
  // one by each of the parity's warps, which have every other t tile of T.
  __device__ float transform_columns(int first, bool inverse) const {
    const int parity = warp / 2, member = warp % 2;
    uint32_t* y = exchange + parity * 2 * CHANNELS * kTileEntries;
    Fragment sum[kLargeTiles / 2][CHANNELS] = {};
    float form = 0.0f;
#pragma unroll 1
    for (int k = 0; k < k_tiles; k += 2) {
      __syncthreads();
      if (k + member < k_tiles) form += mix(parity, k + member, y + member * CHANNELS * kTileEntries);
      __syncthreads();
      if (!inverse) continue;
#pragma unroll 1
      for (int step = 0; step < 2 && k + step < k_tiles; ++step) {
        const ConstantLine<Inverse> constants(arguments.column_inverse, 2 * t_tiles * k_tiles,
                                              ((parity >> 1) * t_tiles + first + member) * k_tiles + k + step,
                                              2 * k_tiles, lane);
        typename Inverse::Tile data[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) load_tile(data[c], y + (step * CHANNELS + c) * kTileEntries, lane);
#pragma unroll
        for (int i = 0; i < kLargeTiles / 2; ++i) {
          if (first + 2 * i + member >= t_tiles) continue;
          const typename Inverse::Constant constant = constants.at(i);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) Inverse::multiply(sum[i][c], constant, data[c]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kLargeTiles / 2; ++i) {
      if (!inverse || first + 2 * i >= t_tiles) continue;
      __syncthreads();
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        store_fragment(sum[i][c], reinterpret_cast<float*>(y + (member * CHANNELS + c) * kTileEntries), lane);
      __syncthreads();
      write_rows(first + 2 * i);
    }
    return form;
  }

  __device__ void write_quadratic() const {
    if (threadIdx.x > 0) return;
    const int exponent = large_image_exponent(arguments, arguments.first + image);
    double sum = 0.0;
    for (int i = 0; i < kLargeWarps; ++i) sum += forms[i];
    const Geometry& geometry = arguments.geometry;
    const PowerOfTwo unscale(2 * (halved(geometry.columns) - exponent) - large_spectrum_exponent(arguments));
    arguments.partial[(arguments.first + image) * l_tiles + l_tile] =
        sum / (static_cast<double>(geometry.rows) * geometry.columns) * unscale.first * unscale.second;
  }

  // Two t tiles of T with their parities in y merged, 16 column frequencies a row of the image; padding becomes zero.
  __device__ void write_rows(int t_tile) const {
    const Geometry& geometry = arguments.geometry;
    const int half_height = (geometry.height + 1) / 2, pitch = l_tiles * kTile;
    const float scale = power_of_two(-halved(geometry.rows));
    const int lines = static_cast<int>(arguments.images) * CHANNELS * geometry.height;
    const float* tiles = reinterpret_cast<const float*>(exchange);
#pragma unroll 1
    for (int task = warp; task < 2 * 2 * CHANNELS; task += kLargeWarps) {
      const int r = task % 2, place = task / 2, channel = place % CHANNELS;  // place: member and channel
      const Fragment even = load_fragment(tiles + (r * 2 * CHANNELS + place) * kTileEntries, lane);
      const Fragment odd = load_fragment(tiles + ((2 + r) * 2 * CHANNELS + place) * kTileEntries, lane);
      const int first_line = r * lines + (static_cast<int>(image) * CHANNELS + channel) * geometry.height;
      float* target = arguments.transformed + static_cast<int64_t>(first_line) * pitch + kTile * l_tile;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = kTile * (t_tile + place / CHANNELS) + lane_row(lane, i);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float* column = target + lane_column(lane, n, 0);
          if (half_height + t < geometry.height)
            *reinterpret_cast<float2*>(column + (half_height + t) * pitch) =
                make_float2((even.at(n, i, 0) + odd.at(n, i, 0)) * scale, (even.at(n, i, 1) + odd.at(n, i, 1)) * scale);
          if (t < half_height)
            *reinterpret_cast<float2*>(column + (half_height - 1 - t) * pitch) =
                make_float2((even.at(n, i, 0) - odd.at(n, i, 0)) * scale, (even.at(n, i, 1) - odd.at(n, i, 1)) * scale);
        }
      }
    }
  }
};

template <class COLUMNS>
__global__ void __launch_bounds__(kLargeThreads, 1) large_columns(const __grid_constant__ LargeArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  COLUMNS(arguments, shared).run();
}

}  // namespace sgr::cuda
