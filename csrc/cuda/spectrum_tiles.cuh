// The spectrum in the order in which the fused kernel's lanes read it.
#pragma once

#include "basis.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

// Where an entry of a tile of floats, as store_fragment lays it out, belongs.
struct TileEntry {
  int lane, n, i, j;

  __device__ explicit TileEntry(unsigned index)
      : lane(index / 4U % kWarp), n(index / (kTileEntries / 2U)), i(index / 2U % 2), j(index % 2U) {}
  __device__ int row() const { return lane_row(lane, i); }
  __device__ int column() const { return lane_column(lane, n, j); }
};

// A pair of channels c <= d by its position among all: row by row.
template <int CHANNELS>
struct ChannelPair {
  int c = 0, d;

  __device__ explicit ChannelPair(int pair) : d(pair) {
    while (d >= CHANNELS - c) d -= CHANNELS - c++;
    d += c;
  }
  __device__ int upper() const { return c * CHANNELS + d; }  // in a matrix of all
  __device__ int lower() const { return d * CHANNELS + c; }
};

// Which frequencies a slot of a pair's tiles is.
template <int BLOCKS>
struct SpectrumPlace {
  using Axis = FrequencyAxis<BLOCKS>;
  int k, l;

  __device__ SpectrumPlace(int slot, const Geometry& geometry) {
    const TileEntry entry(slot % kTileEntries);
    const int block = slot / kTileEntries;
    k = Axis::frequency(block / Axis::kBlocks, entry.row(), geometry.rows);
    l = Axis::frequency(block % Axis::kBlocks, entry.column(), geometry.columns);
  }
  __device__ bool exists() const { return k >= 0 && l >= 0; }
  __device__ int position(const Geometry& geometry) const { return k * geometry.columns + l; }
};

// Tiles [pair][row block][column block] of floats, zero in padded slots, and their exponent, four times. SYMMETRIC: the
// symmetric part in the channels, of which the pairs c <= c' are kept.
template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
struct SpectrumTiles {
  using Axis = FrequencyAxis<BLOCKS>;
  static constexpr int kPairs = SYMMETRIC ? CHANNELS * (CHANNELS + 1) / 2 : CHANNELS * CHANNELS;
  static constexpr int kSlots = Axis::kBlocks * Axis::kBlocks * kTileEntries;  // of one pair
  static constexpr int kEntries = kPairs * kSlots;
  static constexpr int kWords = kEntries + 4;

  __device__ static int offset(int pair, int row_block, int column_block) {
    return ((pair * Axis::kBlocks + row_block) * Axis::kBlocks + column_block) * kTileEntries;
  }

  // The position of (c, c') among the pairs; SYMMETRIC wants c <= c'.
  __device__ static constexpr int pair(int c, int d) {
    return SYMMETRIC ? c * CHANNELS - c * (c - 1) / 2 + d - c : c * CHANNELS + d;
  }

  // Writes the tiles of `block` of `blocks`, times 2^exponent, and the exponent behind all tiles; `maximum` is in
  // shared memory. Each block finds the maximum of the whole spectrum for itself, which saves a launch.
  __device__ static void arrange(const SpectrumView<float>& spectrum, const Geometry& geometry, unsigned* maximum,
                                 int block, int blocks, float* tiles) {
    const auto entry = [&](int slot, int c, int d) {
      const SpectrumPlace<BLOCKS> place(slot, geometry);
      if (!place.exists()) return 0.0f;
      return SYMMETRIC && c != d ? spectrum.symmetric_at(0, c, d, place.k, place.l)
                                 : spectrum.at(0, c, d, place.k, place.l);
    };
    if (threadIdx.x == 0) *maximum = 0;
    __syncthreads();
    float largest = 0.0f;
    for (int slot = threadIdx.x; slot < kSlots; slot += blockDim.x)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) largest = fmaxf(largest, fabsf(entry(slot, c, d)));
    raise_maximum(maximum, largest);
    __syncthreads();
    const int e = exponent(*maximum, geometry);
    const float scale = power_of_two(e);
    for (int slot = block * blockDim.x + threadIdx.x; slot < kSlots; slot += blocks * blockDim.x)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d)
          tiles[pair(c, d) * kSlots + slot] = entry(slot, c, d) * scale;
    if (block == 0 && threadIdx.x < 4) tiles[kEntries + threadIdx.x] = __int_as_float(e);
  }

  // The exponent that keeps the norm of the mixed transforms at or below that of the (scaled) image.
  __device__ static int exponent(unsigned maximum_bits, const Geometry& geometry) {
    const float size = static_cast<float>(geometry.rows) * geometry.columns;
    const float bound = __uint_as_float(maximum_bits) * CHANNELS * 0.5f * sqrtf(size);
    return scaling_exponent(__float_as_uint(bound), 0);
  }
};

template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
__global__ void arrange_spectrum(SpectrumView<float> spectrum, Geometry geometry, float* tiles) {
  SGR_SHARED_MEMORY(shared);
  SpectrumTiles<CHANNELS, BLOCKS, SYMMETRIC>::arrange(spectrum, geometry, reinterpret_cast<unsigned*>(shared),
                                                      blockIdx.x, gridDim.x, tiles);
}

}  // namespace sgr::cuda
