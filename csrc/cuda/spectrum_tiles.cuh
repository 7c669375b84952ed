// The spectrum in the order in which the fused kernel's lanes read it.
#pragma once

#include "basis.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

// Tiles [pair][row block][column block] of floats, as store_fragment lays them out, zero in padded slots and
// channels. SYMMETRIC: the symmetric part in the channels, of which the pairs c <= c' are kept.
template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
struct SpectrumTiles {
  using Axis = FrequencyAxis<BLOCKS>;
  static constexpr int kPairs = SYMMETRIC ? CHANNELS * (CHANNELS + 1) / 2 : CHANNELS * CHANNELS;
  static constexpr int kEntries = kPairs * Axis::kBlocks * Axis::kBlocks * kTileEntries;

  __device__ static int offset(int pair, int row_block, int column_block) {
    return ((pair * Axis::kBlocks + row_block) * Axis::kBlocks + column_block) * kTileEntries;
  }

  // The position of (c, c') among the pairs; SYMMETRIC wants c <= c'.
  __device__ static constexpr int pair(int c, int d) {
    return SYMMETRIC ? c * CHANNELS - c * (c - 1) / 2 + d - c : c * CHANNELS + d;
  }

  __device__ static float entry(int index, const SpectrumView<float>& spectrum, const Geometry& geometry) {
    const int in_tile = index % kTileEntries, tile = index / kTileEntries;
    const int n = in_tile / (kTileEntries / 2), lane = in_tile / 4 % kWarp, i = in_tile / 2 % 2, j = in_tile % 2;
    const int row_block = tile / Axis::kBlocks % Axis::kBlocks, column_block = tile % Axis::kBlocks;
    const int k = Axis::frequency(row_block, lane_row(lane, i), geometry.rows);
    const int l = Axis::frequency(column_block, lane_column(lane, n, j), geometry.columns);
    int c = 0, d = tile / (Axis::kBlocks * Axis::kBlocks);
    if (SYMMETRIC) {
      while (d >= CHANNELS - c) d -= CHANNELS - c++;
      d += c;
    } else {
      c = d / CHANNELS;
      d %= CHANNELS;
    }
    if (k < 0 || l < 0 || c >= geometry.channels || d >= geometry.channels) return 0.0f;
    return SYMMETRIC ? spectrum.symmetric_at(0, c, d, k, l) : spectrum.at(0, c, d, k, l);
  }

  // The exponent that keeps the norm of the mixed transforms at or below that of the (scaled) image.
  __device__ static int exponent(unsigned maximum_bits, const Geometry& geometry) {
    const float size = static_cast<float>(geometry.rows) * geometry.columns;
    const float bound = __uint_as_float(maximum_bits) * CHANNELS * 0.5f * sqrtf(size);
    return scaling_exponent(__float_as_uint(bound), 0);
  }
};

// Writes all tiles, times 2^exponent, and the exponent itself after them. Each block finds the maximum of
// the whole spectrum for itself, which saves a launch.
template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
__global__ void arrange_spectrum(SpectrumView<float> spectrum, Geometry geometry, float* tiles, int* exponent) {
  using Tiles = SpectrumTiles<CHANNELS, BLOCKS, SYMMETRIC>;
  SGR_SHARED_MEMORY(shared);
  unsigned* maximum = reinterpret_cast<unsigned*>(shared);
  if (threadIdx.x == 0) *maximum = 0;
  __syncthreads();
  unsigned bits = 0;
  for (int index = threadIdx.x; index < Tiles::kEntries; index += blockDim.x) {
    const unsigned entry = __float_as_uint(Tiles::entry(index, spectrum, geometry)) & 0x7fffffffu;
    bits = entry > bits ? entry : bits;
  }
  bits = __reduce_max_sync(kAllLanes, bits);
  if (threadIdx.x % kWarp == 0) atomicMax(maximum, bits);
  __syncthreads();
  const int e = Tiles::exponent(*maximum, geometry);
  const int stride = gridDim.x * blockDim.x;
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < Tiles::kEntries; index += stride)
    tiles[index] = Tiles::entry(index, spectrum, geometry) * power_of_two(e);
  if (blockIdx.x == 0 && threadIdx.x == 0) *exponent = e;
}

}  // namespace sgr::cuda
