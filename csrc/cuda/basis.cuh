// The odd-frequency basis in tiles: which frequency a tile's row is, and the constant tiles themselves.
//
// An axis of N pixels is split about its centre into h = ceil(N/2) mirrored pairs, pixel t of a half at
// position s = t + 1/2 (an odd axis gets a zero pixel at its end). Frequencies are theta_k = pi (2k+1)/(2F).
// With low frequencies k < F/2 and high ones counted from above, k = F-1-k',
//   cos(s theta_k) = C[t,k]                 sin(s theta_k) = S[t,k]                    (low)
//   cos(s theta_k) = (-1)^t S[t,k']         sin(s theta_k) = (-1)^t C[t,k']            (high)
// with C[t,k] = cos(pi (2t+1)(2k+1) / (4F)), S likewise: two symmetric matrices are all there is.
#pragma once

#include "fragment.cuh"

namespace sgr::cuda {

// cos(pi m / (4F)), m >= 0, its argument reduced exactly in integers.
__device__ inline float cosine(int m, int frequencies) {
  m %= 8 * frequencies;
  if (m > 4 * frequencies) m = 8 * frequencies - m;
  const bool negative = m > 2 * frequencies;
  if (negative) m = 4 * frequencies - m;
  const float half_turn = 4.0f * frequencies;
  const float value = m <= frequencies ? cospif(m / half_turn) : sinpif((2 * frequencies - m) / half_turn);
  return negative ? -value : value;
}
__device__ inline float sine(int m, int frequencies) { return cosine(m + 6 * frequencies, frequencies); }

// Frequencies of one axis in 2 BLOCKS blocks of 16: the low half, then the high half counted from above.
template <int BLOCKS>
struct FrequencyAxis {
  static constexpr int kBlocks = 2 * BLOCKS;

  __device__ static bool is_high(int block) { return block >= BLOCKS; }
  __device__ static int tile_index(int block) { return block % BLOCKS; }

  // The frequency in a slot of a block, or -1 where the slot is padding.
  __device__ static int frequency(int block, int slot, int frequencies) {
    const int low = kTile * tile_index(block) + slot;
    if (is_high(block)) return low < frequencies / 2 ? frequencies - 1 - low : -1;
    return low < (frequencies + 1) / 2 ? low : -1;
  }
};

// The constant tiles of both axes in shared memory, as operands of PRECISION::Forward.
template <class PRECISION, int BLOCKS>
struct BasisTiles {
  using Forward = typename PRECISION::Forward;
  using Inverse = typename PRECISION::Inverse;
  using Axis = FrequencyAxis<BLOCKS>;
  static constexpr int kTiles = 2 * 2 * BLOCKS * BLOCKS;  // axis, C or S, tile row, tile column
  static constexpr int kWords = kTiles * kTileEntries;

  uint32_t* memory;
  int lane;

  __device__ void fill(int rows, int columns, int warp, int warps) const {
    for (int index = warp; index < kTiles; index += warps) {
      const int frequencies = index / (kTiles / 2) == 0 ? rows : columns;
      const bool sines = index / (BLOCKS * BLOCKS) % 2;
      const int top = kTile * (index / BLOCKS % BLOCKS), left = kTile * (index % BLOCKS);
      Fragment tile;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int m = (2 * (top + lane_row(lane, i)) + 1) * (2 * (left + lane_column(lane, n, j)) + 1);
            tile.at(n, i, j) = sines ? sine(m, frequencies) : cosine(m, frequencies);
          }
      store_tile(Forward::constant(tile), memory + index * kTileEntries, lane);
    }
  }

  // Rows are the frequencies of `block`, columns the pixels of tile `pixels`: for the forward transform.
  __device__ typename Forward::Tile forward(int axis, int parity, int block, int pixels) const {
    typename Forward::Tile tile;
    load_tile(tile, address(axis, parity, block, Axis::tile_index(block), pixels), lane);
    if (Axis::is_high(block)) Forward::negate_odd_columns(tile);
    return tile;
  }
  // Rows are the pixels, columns the frequencies: for the inverse transform.
  __device__ typename Inverse::Tile inverse(int axis, int parity, int block, int pixels) const {
    typename Inverse::Tile tile;
    load_tile(tile, address(axis, parity, block, pixels, Axis::tile_index(block)), lane);
    Inverse::rescale_constant(tile);
    if (Axis::is_high(block)) Inverse::negate_odd_rows(tile, lane);
    return tile;
  }

 private:
  __device__ const uint32_t* address(int axis, int parity, int block, int row, int column) const {
    const int sines = parity ^ (Axis::is_high(block) ? 1 : 0);
    return memory + (((axis * 2 + sines) * BLOCKS + row) * BLOCKS + column) * kTileEntries;
  }
};

}  // namespace sgr::cuda
