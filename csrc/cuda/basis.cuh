// The odd-frequency basis in tiles: which frequency a tile's row is, and the constant tiles themselves.
//
// An axis of N pixels is split about its centre into h = ceil(N/2) mirrored pairs, pixel t of a half at
// position s = t + 1/2 (an odd axis gets a zero pixel at its end). Frequencies are theta_k = pi (2k+1)/(2F).
// With low frequencies k < F/2 and high ones counted from above, k = F-1-k',
//   cos(s theta_k) = C[t,k]                 sin(s theta_k) = S[t,k]                    (low)
//   cos(s theta_k) = (-1)^t S[t,k']         sin(s theta_k) = (-1)^t C[t,k']            (high)
// with C[t,k] = cos(pi (2t+1)(2k+1) / (4F)), S likewise: two symmetric matrices are all there is.
#pragma once

#include <type_traits>
#include <vector>

#include "../plan.h"
#include "fragment.cuh"

namespace sgr::cuda {

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

// Tiles of constants for products, entry(tile, row, column), in the order in which lanes read them. SplitWide's rounded
// ones follow the others.
template <class FORMAT, class Entry>
std::vector<uint32_t> constant_tiles(int count, Entry entry) {
  if constexpr (std::is_same_v<FORMAT, SplitWide>) {
    std::vector<uint32_t> words = constant_tiles<SplitHalf>(count, entry);
    const std::vector<uint32_t> rounded = constant_tiles<BrainFloat>(count, entry);
    words.insert(words.end(), rounded.begin(), rounded.end());
    return words;
  } else {
    constexpr int kStride = FORMAT::kWords * kWarp;
    std::vector<uint32_t> words(static_cast<size_t>(count) * kStride);
    for (int index = 0; index < count; ++index)
      for (int lane = 0; lane < kWarp; ++lane) {
        double entries[kLaneEntries];
        for (int e = 0; e < kLaneEntries; ++e)
          entries[e] = entry(index, lane / 4 + 8 * (e / 2 % 2), 8 * (e / 4) + 2 * (lane % 4) + e % 2);
        uint32_t of_lane[FORMAT::kWords];
        FORMAT::constant_words(entries, of_lane);
        for (int w = 0; w < FORMAT::kWords; ++w)
          words[static_cast<size_t>(index) * kStride + (w / 4 * kWarp + lane) * 4 + w % 4] = of_lane[w];
      }
    return words;
  }
}

// The constant tiles of both axes, in shared memory but for those that SplitWide rounds, which come through the cache.
template <class PRECISION, int BLOCKS>
struct BasisTiles {
  using Forward = typename PRECISION::Forward;
  using Inverse = typename PRECISION::Inverse;
  using Axis = FrequencyAxis<BLOCKS>;
  static constexpr int kTiles = 2 * 2 * BLOCKS * BLOCKS;           // axis, C or S, tile row, tile column
  static constexpr int kWords = kTiles * Forward::kWords * kWarp;  // in shared memory
  static constexpr int kKind = 8 * Inverse::kKind + BLOCKS;        // tells tables of the same sizes apart

  ConstantTiles tiles;
  int lane;

  // `table` in device memory, of which kWords are also in shared memory.
  __device__ BasisTiles(const uint32_t* shared, const uint32_t* table, int lane_of_warp)
      : tiles{shared, table + kWords}, lane(lane_of_warp) {}

  // The tiles for these numbers of frequencies, built by the host.
  static std::vector<uint32_t> table(int rows, int columns) {
    const Angles angles[2] = {Angles(2 * rows), Angles(2 * columns)};  // of the two axes
    return constant_tiles<Inverse>(kTiles, [&](int index, int row, int column) {
      const int64_t top = kTile * (index / BLOCKS % BLOCKS), left = kTile * (index % BLOCKS);
      const int64_t m = (2 * (top + row) + 1) * (2 * (left + column) + 1);
      const Angles& axis = angles[index / (kTiles / 2)];
      return index / (BLOCKS * BLOCKS) % 2 ? axis.sine(m) : axis.cosine(m);
    });
  }

  // Rows are the frequencies of `block`, columns the pixels of tile `pixels`: for the forward transform.
  __device__ typename Forward::Constant forward(int axis, int parity, int block, int pixels) const {
    typename Forward::Constant tile;
    load_constant(tile, tiles, index(axis, parity, block, Axis::tile_index(block), pixels), lane);
    if (Axis::is_high(block)) Forward::negate_odd_columns(tile);
    return tile;
  }
  // Rows are the pixels, columns the frequencies: for the inverse transform.
  __device__ typename Inverse::Constant inverse(int axis, int parity, int block, int pixels) const {
    typename Inverse::Constant tile;
    load_constant(tile, tiles, index(axis, parity, block, pixels, Axis::tile_index(block)), lane);
    if (Axis::is_high(block)) Inverse::negate_odd_rows(tile, lane);
    return tile;
  }

 private:
  __device__ static int index(int axis, int parity, int block, int row, int column) {
    const int sines = parity ^ (Axis::is_high(block) ? 1 : 0);
    return ((axis * 2 + sines) * BLOCKS + row) * BLOCKS + column;
  }
};

}  // namespace sgr::cuda
