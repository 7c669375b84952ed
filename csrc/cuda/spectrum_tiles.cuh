// The spectrum in the order in which the fused kernel's lanes read it.
#pragma once

#include "basis.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

// Where an entry of a tile of floats, as store_fragment lays it out, belongs.
struct TileEntry {
  int lane, n, i, j;

  __device__ explicit TileEntry(int index)
      : lane(index / 4 % kWarp), n(index / (kTileEntries / 2)), i(index / 2 % 2), j(index % 2) {}
  __device__ int row() const { return lane_row(lane, i); }
  __device__ int column() const { return lane_column(lane, n, j); }
};

// Tiles [pair][row block][column block] of floats, zero in padded slots and channels. SYMMETRIC: the symmetric part in
// the channels, of which the pairs c <= c' are kept.
template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
struct SpectrumTiles {
  using Axis = FrequencyAxis<BLOCKS>;
  static constexpr int kPairs = SYMMETRIC ? CHANNELS * (CHANNELS + 1) / 2 : CHANNELS * CHANNELS;
  static constexpr int kBlockPairs = Axis::kBlocks * Axis::kBlocks;
  static constexpr int kEntries = kPairs * kBlockPairs * kTileEntries;

  __device__ static int offset(int pair, int row_block, int column_block) {
    return ((pair * Axis::kBlocks + row_block) * Axis::kBlocks + column_block) * kTileEntries;
  }

  // The position of (c, c') among the pairs; SYMMETRIC wants c <= c'.
  __device__ static constexpr int pair(int c, int d) {
    return SYMMETRIC ? c * CHANNELS - c * (c - 1) / 2 + d - c : c * CHANNELS + d;
  }

  // Calls visit(index, value) for the entries that fall to `thread` of `threads`, a multiple of a tile's entries.
  template <class Visit>
  __device__ static void visit_entries(int thread, int threads, const SpectrumView<float>& spectrum,
                                       const Geometry& geometry, Visit visit) {
    const TileEntry entry(thread % kTileEntries);
#pragma unroll 1
    for (int block = thread / kTileEntries; block < kBlockPairs; block += threads / kTileEntries) {
      const int row_block = block / Axis::kBlocks, column_block = block % Axis::kBlocks;
      const int k = Axis::frequency(row_block, entry.row(), geometry.rows);
      const int l = Axis::frequency(column_block, entry.column(), geometry.columns);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
          float value = 0.0f;
          if (k >= 0 && l >= 0 && c < geometry.channels && d < geometry.channels)
            value = SYMMETRIC && c != d ? spectrum.symmetric_at(0, c, d, k, l) : spectrum.at(0, c, d, k, l);
          visit(offset(pair(c, d), row_block, column_block) + thread % kTileEntries, value);
        }
    }
  }

  // The exponent that keeps the norm of the mixed transforms at or below that of the (scaled) image.
  __device__ static int exponent(unsigned maximum_bits, const Geometry& geometry) {
    const float size = static_cast<float>(geometry.rows) * geometry.columns;
    const float bound = __uint_as_float(maximum_bits) * CHANNELS * 0.5f * sqrtf(size);
    return scaling_exponent(__float_as_uint(bound), 0);
  }
};

// Raises *maximum, in shared memory and zero before, to the largest magnitude of all threads' values.
__device__ inline void raise_maximum(unsigned* maximum, float magnitude) {
  const unsigned bits = __reduce_max_sync(kAllLanes, __float_as_uint(magnitude));
  if (threadIdx.x % kWarp == 0) atomicMax(maximum, bits);
}

// Writes all tiles, times 2^exponent, and the exponent. Each block finds the maximum of the whole spectrum for itself,
// which saves a launch.
template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
__global__ void arrange_spectrum(SpectrumView<float> spectrum, Geometry geometry, float* tiles, int* exponent) {
  using Tiles = SpectrumTiles<CHANNELS, BLOCKS, SYMMETRIC>;
  SGR_SHARED_MEMORY(shared);
  unsigned* maximum = reinterpret_cast<unsigned*>(shared);
  if (threadIdx.x == 0) *maximum = 0;
  __syncthreads();
  float largest = 0.0f;
  Tiles::visit_entries(threadIdx.x, blockDim.x, spectrum, geometry,
                       [&](int, float value) { largest = fmaxf(largest, fabsf(value)); });
  raise_maximum(maximum, largest);
  __syncthreads();
  const int e = Tiles::exponent(*maximum, geometry);
  Tiles::visit_entries(blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x, spectrum, geometry,
                       [&](int index, float value) { tiles[index] = value * power_of_two(e); });
  if (blockIdx.x == 0 && threadIdx.x == 0) *exponent = e;
}

}  // namespace sgr::cuda
