// Images in and out of shared memory, split about their centre into four parities of 16x16 tiles.
//
// Parity 2p + r is odd in y where p = 1 and odd in x where r = 1. A unit is what one lane moves at a time: its four
// entries of a row of a tile, in each of the four mirrored quadrants.
#pragma once

#include "basis.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

constexpr int kParities = 4;

// PLANES channel images of up to 32 BLOCKS pixels a side, moved by THREADS threads.
template <int PLANES, int CHANNELS, int BLOCKS, int THREADS>
struct ImageTiles {
  static constexpr int kTilesPerPlane = BLOCKS * BLOCKS;
  static constexpr int kTiles = PLANES * kTilesPerPlane;  // of one parity
  static constexpr int kUnits = kTiles * 2 * kWarp;
  static constexpr int kRounds = (kUnits + THREADS - 1) / THREADS;

  struct Unit {
    bool exists;
    int tile, lane, i;
    int64_t image;
    int plane, channel, t, s;  // row and first column in the half image
  };

  // A thread's share of the parities, by round.
  struct Entries {
    float value[kRounds][kParities][2][2];  // [n][j]
  };

  __device__ static Unit unit(int round, int64_t first_image) {
    const int index = round * THREADS + fresh_thread_index();
    Unit u;
    u.exists = index < kUnits;
    u.tile = index / (2 * kWarp);
    u.lane = index % kWarp;
    u.i = index / kWarp % 2;
    u.plane = u.tile / kTilesPerPlane;
    u.channel = u.plane % CHANNELS;
    u.image = first_image + u.plane / CHANNELS;
    u.t = kTile * (u.tile / BLOCKS % BLOCKS) + lane_row(u.lane, u.i);
    u.s = kTile * (u.tile % BLOCKS) + lane_column(u.lane, 0, 0);
    return u;
  }

  // Calls visit(quadrant, n, j, element offset) for the pixels of a unit that lie in the image; quadrants 2 and 3 are
  // below the centre, 1 and 3 right of it.
  template <class Visit>
  __device__ static void visit_pixels(const Unit& u, const Geometry& geometry, const int64_t (&stride)[4],
                                      Visit visit) {
    if (!u.exists || u.image >= geometry.batch || u.channel >= geometry.channels) return;
    const int64_t base = u.image * stride[0] + u.channel * stride[1];
    const int half_height = (geometry.height + 1) / 2, half_width = (geometry.width + 1) / 2;
#pragma unroll
    for (int quadrant = 0; quadrant < kParities; ++quadrant) {
      const int y = quadrant & 2 ? half_height + u.t : half_height - 1 - u.t;
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const int n = column / 2, j = column % 2, s = u.s + 8 * n + j;
        const int x = quadrant & 1 ? half_width + s : half_width - 1 - s;
        if (y >= 0 && y < geometry.height && x >= 0 && x < geometry.width)
          visit(quadrant, n, j, base + y * stride[2] + x * stride[3]);
      }
    }
  }

  // Starts both ends of every image row (at most two cache lines in the common layouts) on their way, which costs no
  // registers.
  __device__ static void prefetch_rows(const ImageView& view, const Geometry& geometry, int64_t first_image) {
    const int thread = fresh_thread_index();
    const int x = thread % 2 ? geometry.width - 1 : 0;
    for (int plane = 0; plane < PLANES; ++plane) {
      const int64_t image = first_image + plane / CHANNELS;
      const int channel = plane % CHANNELS;
      if (image >= geometry.batch || channel >= geometry.channels) continue;
      const int64_t base = image * view.stride[0] + channel * view.stride[1] + x * view.stride[3];
      for (int y = thread / 2; y < geometry.height; y += THREADS / 2)
        prefetch(static_cast<const char*>(view.data) + element_size(view.element) * (base + y * view.stride[2]));
    }
  }

  // Reads the images, splits them into parities (twice an orthonormal butterfly) and raises maximum[image], the bits of
  // a magnitude, to the largest entry's: exact, in whatever order. NaNs are left out; they need no scale.
  __device__ static void load(Entries& entries, unsigned* maximum, const ImageView& view, const Geometry& geometry,
                              int64_t first_image) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const Unit u = unit(round, first_image);
      float corner[kParities][2][2] = {};
      with_elements<float>(view, [&](const auto* data) {
        visit_pixels(u, geometry, view.stride,
                     [&](int quadrant, int n, int j, int64_t offset) { corner[quadrant][n][j] = widen(data[offset]); });
      });
      float largest = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float right_even = corner[3][n][j] + corner[1][n][j], right_odd = corner[3][n][j] - corner[1][n][j];
          const float left_even = corner[2][n][j] + corner[0][n][j], left_odd = corner[2][n][j] - corner[0][n][j];
          const float parity[kParities] = {right_even + left_even, right_even - left_even, right_odd + left_odd,
                                           right_odd - left_odd};
#pragma unroll
          for (int p = 0; p < kParities; ++p) {
            entries.value[round][p][n][j] = parity[p];
            largest = fmaxf(largest, fabsf(parity[p]));
          }
        }
      const unsigned bits = __reduce_max_sync(kAllLanes, __float_as_uint(largest));
      if (u.exists && u.lane == 0) atomicMax(maximum + u.plane / CHANNELS, bits);
    }
  }

  // Scales each image to its maximum, below 2^ceiling, and stores operands: tile index parity * kTiles + tile.
  template <class FORWARD>
  __device__ static void store(const Entries& entries, const unsigned* maximum, int ceiling, uint32_t* memory) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const Unit u = unit(round, 0);
      if (!u.exists) continue;
      const float scale = power_of_two(scaling_exponent(maximum[u.plane / CHANNELS], ceiling));
#pragma unroll
      for (int p = 0; p < kParities; ++p) {
        float scaled[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) scaled[n][j] = entries.value[round][p][n][j] * scale;
        uint2 words[2];
        FORWARD::row_words(scaled, words);
#pragma unroll
        for (int v = 0; v < 2; ++v)
          *reinterpret_cast<uint2*>(memory + (p * kTiles + u.tile) * kTileEntries + pair_offset(u.lane, v, u.i)) =
              words[v];
      }
    }
  }

  // Merges parity tiles of floats (tile index as above) and writes them, times factor 2^exponent and with the scale of
  // store undone.
  __device__ static void write(const float* memory, const unsigned* maximum, int ceiling, float factor, int exponent,
                               const ImageView& view, const Geometry& geometry, int64_t first_image) {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const Unit u = unit(round, first_image);
      if (!u.exists) continue;
      float2 parity[kParities][2];
#pragma unroll
      for (int p = 0; p < kParities; ++p)
#pragma unroll
        for (int n = 0; n < 2; ++n)
          parity[p][n] = *reinterpret_cast<const float2*>(memory + (p * kTiles + u.tile) * kTileEntries +
                                                          pair_offset(u.lane, n, u.i));
      const PowerOfTwo unscale(exponent - scaling_exponent(maximum[u.plane / CHANNELS], ceiling));
      const float scale = factor * unscale.first;
      with_elements<float>(view, [&](auto* data) {
        visit_pixels(u, geometry, view.stride, [&](int quadrant, int n, int j, int64_t offset) {
          const float ee = j ? parity[0][n].y : parity[0][n].x, eo = j ? parity[1][n].y : parity[1][n].x;
          const float oe = j ? parity[2][n].y : parity[2][n].x, oo = j ? parity[3][n].y : parity[3][n].x;
          const float even = quadrant & 1 ? ee + eo : ee - eo;
          const float odd = quadrant & 1 ? oe + oo : oe - oo;
          const float sum = quadrant & 2 ? even + odd : even - odd;
          narrow(sum * scale * unscale.second, data[offset]);
        });
      });
    }
  }
};

}  // namespace sgr::cuda
