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

// Tiles [pair][row block][column block] of floats, zero in padded slots and channels. SYMMETRIC: the symmetric part in
// the channels, of which the pairs c <= c' are kept.
template <int CHANNELS, int BLOCKS, bool SYMMETRIC>
struct SpectrumTiles {
  using Axis = FrequencyAxis<BLOCKS>;
  static constexpr int kPairs = SYMMETRIC ? CHANNELS * (CHANNELS + 1) / 2 : CHANNELS * CHANNELS;
  static constexpr int kSlots = Axis::kBlocks * Axis::kBlocks * kTileEntries;  // of one pair
  static constexpr int kEntries = kPairs * kSlots;

  __device__ static int offset(int pair, int row_block, int column_block) {
    return ((pair * Axis::kBlocks + row_block) * Axis::kBlocks + column_block) * kTileEntries;
  }

  // The position of (c, c') among the pairs; SYMMETRIC wants c <= c'.
  __device__ static constexpr int pair(int c, int d) {
    return SYMMETRIC ? c * CHANNELS - c * (c - 1) / 2 + d - c : c * CHANNELS + d;
  }

  // Entry of pair (c, d) in slot `slot` of the pair's tiles.
  __device__ static float entry(const SpectrumView<float>& spectrum, const Geometry& geometry, int c, int d, int slot) {
    const TileEntry place(slot % kTileEntries);
    const int block = slot / kTileEntries;
    const int k = Axis::frequency(block / Axis::kBlocks, place.row(), geometry.rows);
    const int l = Axis::frequency(block % Axis::kBlocks, place.column(), geometry.columns);
    if (k < 0 || l < 0) return 0.0f;
    return SYMMETRIC && c != d ? spectrum.symmetric_at(0, c, d, k, l) : spectrum.at(0, c, d, k, l);
  }

  // Calls visit(index, value) for the entries that fall to `thread` of `threads`.
  template <class Visit>
  __device__ static void visit_entries(int thread, int threads, const SpectrumView<float>& spectrum,
                                       const Geometry& geometry, Visit visit) {
#pragma unroll 2
    for (int slot = thread; slot < kSlots; slot += threads)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d)
          visit(pair(c, d) * kSlots + slot, entry(spectrum, geometry, c, d, slot));
  }

  // All tiles into shared memory, scaled, by all THREADS threads of a block; the exponent of the scale is returned.
  // *maximum is in shared memory and zero; a __syncthreads() must follow.
  template <int THREADS>
  __device__ static int gather(float* tiles, unsigned* maximum, const SpectrumView<float>& spectrum,
                               const Geometry& geometry) {
    constexpr int kTurns = kSlots / 2 / THREADS;  // of a pair of columns
    static_assert(kTurns * 2 * THREADS == kSlots);
    const int stride[4] = {static_cast<int>(spectrum.stride[0]), static_cast<int>(spectrum.stride[1]),
                           static_cast<int>(spectrum.stride[2]), static_cast<int>(spectrum.stride[3])};
    float value[kTurns][kPairs][2];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const unsigned slot = 2 * (i * THREADS + threadIdx.x), block = slot / kTileEntries;
      const TileEntry place(slot % kTileEntries);
      const int k = Axis::frequency(block / Axis::kBlocks, place.row(), geometry.rows);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int l = Axis::frequency(block % Axis::kBlocks, place.column() + j, geometry.columns);
        // Padding is some entry times zero: loads without conditions go out together.
        const bool exists = k >= 0 && l >= 0;
        const int offset = exists ? k * stride[2] + l * stride[3] : 0;
        const float whole = exists ? 1.0f : 0.0f, half = exists ? 0.5f : 0.0f;
        const auto load = [&](int c, int d) { return spectrum.data[offset + (c * stride[0] + d * stride[1])]; };
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
            float& here = value[i][pair(c, d)][j];
            here = SYMMETRIC && c != d ? half * load(c, d) + half * load(d, c) : whole * load(c, d);
            largest = fmaxf(largest, fabsf(here));
          }
      }
    }
    raise_maximum(maximum, largest);
    __syncthreads();
    const int e = exponent(*maximum, geometry);
    const float scale = power_of_two(e);
#pragma unroll
    for (int i = 0; i < kTurns; ++i)
#pragma unroll
      for (int p = 0; p < kPairs; ++p)
        *reinterpret_cast<float2*>(tiles + p * kSlots + 2 * (i * THREADS + threadIdx.x)) =
            make_float2(value[i][p][0] * scale, value[i][p][1] * scale);
    return e;
  }

  // The exponent that keeps the norm of the mixed transforms at or below that of the (scaled) image.
  __device__ static int exponent(unsigned maximum_bits, const Geometry& geometry) {
    const float size = static_cast<float>(geometry.rows) * geometry.columns;
    const float bound = __uint_as_float(maximum_bits) * CHANNELS * 0.5f * sqrtf(size);
    return scaling_exponent(__float_as_uint(bound), 0);
  }
};

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
