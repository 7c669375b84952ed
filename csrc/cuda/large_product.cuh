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
template <class FORMAT>
std::vector<uint32_t> large_basis(int pixels, int frequencies, bool by_frequency, bool as_data) {
  const int half = (pixels + 1) / 2;
  const int rows = tiles_of(by_frequency ? frequencies : half), columns = tiles_of(by_frequency ? half : frequencies);
  const Angles angles(2 * frequencies);
  return constant_tiles<FORMAT>(2 * rows * columns, as_data, [&](int index, int row, int column) {
    row += kTile * (index / columns % rows);
    column += kTile * (index % columns);
    const int64_t k = by_frequency ? row : column, t = by_frequency ? column : row;
    const int64_t m = (2 * t + 1) * (2 * k + 1);
    if (k >= frequencies || t >= half) return 0.0;
    return index / (rows * columns) ? angles.sine(m) : angles.cosine(m);
  });
}

// Tiles of a large_basis of `count` tiles, from the one at `first` on, `step` apart.
template <class FORMAT>
struct ConstantLine {
  ConstantTiles from;
  int step;

  __device__ ConstantLine(const uint32_t* basis, int count, int first, int step_of_tiles, int lane)
      : from{kept(basis + first * FORMAT::kWords * kWarp + pair_offset(lane, 0, 0)),
             kept(basis + count * kTileEntries + first * (kTileEntries / 2) + pair_offset(lane, 0, 0))},
        step(step_of_tiles) {}
  __device__ typename FORMAT::Constant at(int index) const {
    typename FORMAT::Constant constant;
    load_constant(constant, from, index * step, 0);
    return constant;
  }
};

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
    const int part = (blockIdx.x - kMagnitudeBlocks) % kImageBlocks, warps = threads / kWarp;
    if (view.dense) {
      const int vectors = CHANNELS * geometry.height * geometry.width / 4, step = kImageBlocks * threads;
      const float* first = static_cast<const float*>(view.data) + image * view.stride[0];
#pragma unroll 4
      for (int i = part * threads + thread; i < vectors; i += step) {
        const float4 four = reinterpret_cast<const float4*>(first)[i];
        largest = fmaxf(fmaxf(largest, fabsf(four.x)), fmaxf(fabsf(four.y), fmaxf(fabsf(four.z), fabsf(four.w))));
      }
    } else {
      with_elements<float>(view, [&](const auto* data) {
        for (int line = part * warps + thread / kWarp; line < CHANNELS * geometry.height;
             line += kImageBlocks * warps) {
          const auto* pixels = data + image * view.stride[0] + line / geometry.height * view.stride[1] +
                               line % geometry.height * view.stride[2];
#pragma unroll 8
          for (int x = thread % kWarp; x < geometry.width; x += kWarp)
            largest = fmaxf(largest, fabsf(widen(pixels[x * view.stride[3]])));
        }
      });
    }
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

}  // namespace sgr::cuda
