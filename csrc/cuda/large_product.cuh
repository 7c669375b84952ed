// v = Sigma g and q = g' Sigma g of images above 64 pixels with up to three channels, in two passes over memory.
//
// The first kernel takes an image and 16 column frequencies l through everything between the transforms of the rows:
//   U[l,t] = B' X',  Z[l,k] = U A,  Y = Lambda Z (mixing channels),  T[t,l] = A Y'
// for each of the four parities; neither Z nor Y reaches memory. The second one finishes rows: v[s,n] = B T'. A data
// tile is an operand of the next product as it stands, see fragment.cuh; constants come split from the host. Scales are
// powers of two throughout, so that no operand reaches fp16's 2^16: of images by their largest pixel and their size, of
// U, Y and T by `halved` of the frequencies, which keeps the transforms' norm at or below one.
#pragma once

#include "image_tiles.cuh"
#include "spectrum_tiles.cuh"

namespace sgr::cuda {

constexpr int kLargeWarps = 8, kLargeThreads = kLargeWarps * kWarp;
constexpr int kLargeTiles = 8;        // of half an image's rows, that a block has at a time
constexpr int kMagnitudeBlocks = 64;  // that look for the spectrum's largest entry
constexpr int kImageBlocks = 8;       // that look for one image's

__host__ __device__ inline int tiles_of(int size) { return (size + kTile - 1) / kTile; }
__host__ __device__ inline int half_tiles(int pixels) { return tiles_of((pixels + 1) / 2); }
// The exponent of the power of two at or above sqrt(F / 2).
__host__ __device__ inline int halved(int64_t frequencies) {
  int exponent = 0;
  while (int64_t{2} << 2 * exponent < frequencies) ++exponent;
  return exponent;
}

// cos and sin((t + 1/2) theta_k), split, as tiles [parity][row tile][column tile]. by_frequency: rows are frequencies,
// columns pixels; as_data: as the second operand.
template <class FORWARD>
std::vector<uint32_t> large_basis(int pixels, int frequencies, bool by_frequency, bool as_data) {
  const int half = (pixels + 1) / 2;
  const int rows = tiles_of(by_frequency ? frequencies : half), columns = tiles_of(by_frequency ? half : frequencies);
  const Angles angles(2 * frequencies);
  std::vector<uint32_t> words(2 * rows * columns * kTileEntries);
  for (int index = 0; index < 2 * rows * columns; ++index)
    for (int lane = 0; lane < kWarp; ++lane) {
      double entries[kLaneEntries];
      for (int e = 0; e < kLaneEntries; ++e) {
        const int64_t row = kTile * (index / columns % rows) + lane / 4 + 8 * (e / 2 % 2);
        const int64_t column = kTile * (index % columns) + 8 * (e / 4) + 2 * (lane % 4) + e % 2;
        const int64_t k = by_frequency ? row : column, t = by_frequency ? column : row;
        const int64_t m = (2 * t + 1) * (2 * k + 1);
        const bool exists = k < frequencies && t < half;
        entries[e] = exists ? (index / (rows * columns) ? angles.sine(m) : angles.cosine(m)) : 0.0;
      }
      uint32_t of_lane[FORWARD::kWords];
      FORWARD::constant_words(entries, of_lane);
      for (int w = 0; w < FORWARD::kWords; ++w) {
        const int place = as_data ? w / 4 * 4 + w % 2 * 2 + w / 2 % 2 : w;
        words[index * kTileEntries + (w / 4 * kWarp + lane) * 4 + place % 4] = of_lane[w];
      }
    }
  return words;
}

// A data tile as first operand.
template <int WORDS>
__device__ inline Words<WORDS> as_matrix(const Words<WORDS>& tile) {
  Words<WORDS> result;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) result.word[w] = tile.word[w / 4 * 4 + w % 2 * 2 + w / 2 % 2];
  return result;
}

struct LargeArguments {
  ImageView gradient, product;
  SpectrumView<float> spectrum;
  Geometry geometry;
  unsigned* magnitudes;   // [kMagnitudeBlocks] of the spectrum, [image][kImageBlocks]
  float* spectrum_tiles;  // [pair][l tile][k tile][16x16 as store_fragment, rows l]
  const uint32_t *row_forward, *column_forward, *column_inverse, *row_inverse;  // large_basis
  float* transformed;                                                           // T: [odd in x][image, channel, y][l]
  double* partial;                                                              // of q, [image][l tile], or null
  int64_t first, images;                                                        // of this pass
};

__device__ inline unsigned largest_of(const unsigned* values, int count) {
  unsigned largest = 0;
  for (int i = 0; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}
__device__ inline int large_image_exponent(const LargeArguments& arguments, int64_t image) {
  // A parity's entry is the sum of four pixels.
  const unsigned bits = largest_of(arguments.magnitudes + kMagnitudeBlocks + image * kImageBlocks, kImageBlocks);
  const Geometry& geometry = arguments.geometry;  // |Y| is at most the norm of all parities
  return scaling_exponent(bits, 13 - halved(2 * int64_t{geometry.channels} * geometry.height * geometry.width));
}
// So that the norm of Y is at or below that of U.
__device__ inline int large_spectrum_exponent(const LargeArguments& arguments) {
  const float largest = __uint_as_float(largest_of(arguments.magnitudes, kMagnitudeBlocks));
  const float bound = largest * arguments.geometry.channels * power_of_two(halved(arguments.geometry.rows));
  return scaling_exponent(__float_as_uint(bound), 0);
}

// The largest magnitudes, by parts: of the spectrum and of each image.
template <int CHANNELS>
__global__ void largest_magnitudes(LargeArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  unsigned* maximum = reinterpret_cast<unsigned*>(shared);
  if (threadIdx.x == 0) *maximum = 0;
  __syncthreads();
  const Geometry& geometry = arguments.geometry;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float largest = 0.0f;
  if (blockIdx.x < kMagnitudeBlocks) {
    for (int row = blockIdx.x; row < CHANNELS * CHANNELS * geometry.rows; row += kMagnitudeBlocks) {
      const int pair = row / geometry.rows;
      for (int l = thread; l < geometry.columns; l += threads)
        largest =
            fmaxf(largest, fabsf(arguments.spectrum.at(0, pair / CHANNELS, pair % CHANNELS, row % geometry.rows, l)));
    }
  } else {
    const int64_t image = (blockIdx.x - kMagnitudeBlocks) / kImageBlocks;
    const ImageView& view = arguments.gradient;
    with_elements<float>(view, [&](const auto* data) {
      const int part = (blockIdx.x - kMagnitudeBlocks) % kImageBlocks, warps = threads / kWarp;
      for (int line = part * warps + thread / kWarp; line < CHANNELS * geometry.height; line += kImageBlocks * warps) {
        const auto* pixels = data + image * view.stride[0] + line / geometry.height * view.stride[1] +
                             line % geometry.height * view.stride[2];
#pragma unroll 8
        for (int x = thread % kWarp; x < geometry.width; x += kWarp)
          largest = fmaxf(largest, fabsf(widen(pixels[x * view.stride[3]])));
      }
    });
  }
  raise_maximum(maximum, largest);
  __syncthreads();
  if (threadIdx.x == 0) arguments.magnitudes[blockIdx.x] = *maximum;
}

// The symmetric part, or all pairs, scaled and padded; a block of threads per tile of a pair.
template <int CHANNELS, bool SYMMETRIC>
__global__ void arrange_large_spectrum(LargeArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const int k_tiles = tiles_of(geometry.rows);
  const TileEntry place(threadIdx.x);
  const int l = kTile * (blockIdx.x / k_tiles) + place.row(), k = kTile * (blockIdx.x % k_tiles) + place.column();
  const float scale = power_of_two(large_spectrum_exponent(arguments));
  int pair = 0;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
    for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
      float value = 0.0f;
      if (l < geometry.columns && k < geometry.rows)
        value = SYMMETRIC ? arguments.spectrum.symmetric_at(0, c, d, k, l) : arguments.spectrum.at(0, c, d, k, l);
      arguments.spectrum_tiles[(static_cast<int64_t>(pair++) * gridDim.x + blockIdx.x) * kTileEntries + threadIdx.x] =
          value * scale;
    }
}

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

  // X of the parities, times scale: rows t, columns s. PAIRS: where two columns are one aligned access. What lies
  // outside of the half image meets constants that are zero, so that a pixel at its edge may stand for it.
  template <bool PAIRS, class Element>
  __device__ void read_tile(Fragment (&x)[kParities], const Element* plane, int t_tile, int s_tile, float scale) const {
    const Geometry& geometry = arguments.geometry;
    const int half_height = (geometry.height + 1) / 2, half_width = (geometry.width + 1) / 2;
    const int line = static_cast<int>(arguments.gradient.stride[2]),
              step = static_cast<int>(arguments.gradient.stride[3]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = min(kTile * t_tile + lane_row(lane, i), half_height - 1);
      const bool has_lower = half_height + t < geometry.height;  // the middle line of an odd number has no mirror image
      const Element* upper = plane + (half_height - 1 - t) * line;
      const Element* lower = has_lower ? plane + (half_height + t) * line : upper;
      const float lower_scale = has_lower ? scale : 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float right[2][2], left[2][2];  // [lower][j]
        if constexpr (PAIRS) {
          const int s = min(kTile * s_tile + lane_column(lane, n, 0), half_width - 2);
#pragma unroll
          for (int low = 0; low < 2; ++low) {
            const Element* row = low ? lower : upper;
            const float2 right_pair = *reinterpret_cast<const float2*>(row + (half_width + s));
            const float2 left_pair = *reinterpret_cast<const float2*>(row + (half_width - 2 - s));
            right[low][0] = right_pair.x, right[low][1] = right_pair.y;
            left[low][0] = left_pair.y, left[low][1] = left_pair.x;
          }
        } else {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int s = min(kTile * s_tile + lane_column(lane, n, j), half_width - 1);
            const bool has_right = half_width + s < geometry.width;
#pragma unroll
            for (int low = 0; low < 2; ++low) {
              const Element* row = low ? lower : upper;
              left[low][j] = widen(row[(half_width - 1 - s) * step]);
              right[low][j] = has_right ? widen(row[(half_width + s) * step]) : 0.0f;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float lower_even = (right[1][j] + left[1][j]) * lower_scale;
          const float lower_odd = (right[1][j] - left[1][j]) * lower_scale;
          const float upper_even = (right[0][j] + left[0][j]) * scale, upper_odd = (right[0][j] - left[0][j]) * scale;
          x[0].at(n, i, j) = lower_even + upper_even;
          x[1].at(n, i, j) = lower_odd + upper_odd;
          x[2].at(n, i, j) = lower_even - upper_even;
          x[3].at(n, i, j) = lower_odd - upper_odd;
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
    const uint32_t* constants = arguments.row_forward + l_tile * s_tiles * kTileEntries;
#pragma unroll 1
    for (int task = warp; task < CHANNELS * t_tiles; task += kLargeWarps) {
      const int channel = task % CHANNELS, t = task / CHANNELS;
      const Element* plane = data + sample * arguments.gradient.stride[0] + channel * arguments.gradient.stride[1];
      Fragment sum[kParities] = {};
#pragma unroll 1
      for (int s = 0; s < s_tiles; ++s) {
        Fragment x[kParities];
        read_tile<PAIRS>(x, plane, t, s, scale);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          typename Forward::Tile constant;
          load_tile(constant, constants + (r * l_tiles * s_tiles + s) * kTileEntries, lane);
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            auto product = Forward::start(Fragment{});
            Forward::multiply(product, constant, Forward::data(x[2 * p + r]));
            sum[2 * p + r] += Forward::finish(product);
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
#pragma unroll 1
    for (int t = 0; t < t_tiles; ++t) {
      typename Forward::Tile constant;
      load_tile(constant, arguments.column_forward + (((parity >> 1) * k_tiles + k) * t_tiles + t) * kTileEntries,
                lane);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        typename Forward::Tile u;
        load_tile(u, transformed_tile(parity, c, t), lane);
        auto product = Forward::start(Fragment{});
        Forward::multiply(product, u, constant);
        z[c] += Forward::finish(product);
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
        typename Inverse::Tile data[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) load_tile(data[c], y + (step * CHANNELS + c) * kTileEntries, lane);
#pragma unroll
        for (int i = 0; i < kLargeTiles / 2; ++i) {
          const int t = first + 2 * i + member;
          if (t >= t_tiles) continue;
          typename Inverse::Tile constant;
          load_tile(constant,
                    arguments.column_inverse + (((parity >> 1) * t_tiles + t) * k_tiles + k + step) * kTileEntries,
                    lane);
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c) {
            auto product = Inverse::start(sum[i][c]);
            Inverse::multiply(product, constant, data[c]);
            sum[i][c] = Inverse::finish(product);
          }
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

// v from T: a warp has 16 lines, and blockIdx.y counts runs of kRowTiles tiles of half a line's pixels.
constexpr int kRowTiles = 4;

template <class INVERSE>
__global__ void __launch_bounds__(kLargeThreads, 2) large_rows(const __grid_constant__ LargeArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int l_tiles = tiles_of(geometry.columns), s_tiles = half_tiles(geometry.width);
  const int lines = static_cast<int>(arguments.images) * geometry.channels * geometry.height;
  const int first_line = (static_cast<int>(blockIdx.x) * kLargeWarps + warp) * kTile, pitch = l_tiles * kTile;
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
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int s = static_cast<int>(blockIdx.y) * kRowTiles + i;
        if (s >= s_tiles) continue;
        typename INVERSE::Tile constant;
        load_tile(constant, arguments.row_inverse + ((r * s_tiles + s) * l_tiles + l_tile) * kTileEntries, lane);
        auto product = INVERSE::start(sum[r][i]);
        INVERSE::multiply(product, constant, data);
        sum[r][i] = INVERSE::finish(product);
      }
    }

  const int half_width = (geometry.width + 1) / 2;
  const int exponent = halved(geometry.columns) + halved(geometry.rows) - large_spectrum_exponent(arguments);
  const float factor = 1.0f / (static_cast<float>(geometry.rows) * geometry.columns);
  with_elements<float>(arguments.product, [&](auto* data) {
    const int64_t (&stride)[4] = arguments.product.stride;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      const int n = column / 2, j = column % 2, line = first_line + lane_column(lane, n, j);
      const int plane = line / geometry.height;
      if (line >= lines) continue;
      const int64_t image = arguments.first + plane / geometry.channels;
      const PowerOfTwo unscale(exponent - large_image_exponent(arguments, image));
      auto* target =
          data + image * stride[0] + plane % geometry.channels * stride[1] + line % geometry.height * stride[2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int s = kTile * (static_cast<int>(blockIdx.y) * kRowTiles + i) + lane_row(lane, row);
          const float even = sum[0][i].at(n, row, j), odd = sum[1][i].at(n, row, j);
          if (half_width + s < geometry.width)
            narrow(unscale * ((even + odd) * factor), target[(half_width + s) * stride[3]]);
          if (s < half_width) narrow(unscale * ((even - odd) * factor), target[(half_width - 1 - s) * stride[3]]);
        }
    }
  });
}

}  // namespace sgr::cuda
