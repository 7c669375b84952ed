// Images in and out of shared memory, split about their centre into four parities of 16x16 tiles.
//
// Parity 2p + r is odd in y where p = 1 and odd in x where r = 1. A unit is what one lane moves at a time:
// two adjacent pixels of a tile in each of the four mirrored quadrants.
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
  static constexpr int kUnits = kTiles * 4 * kWarp;
  static constexpr int kRounds = (kUnits + THREADS - 1) / THREADS;
  static constexpr int kImages = PLANES / CHANNELS;

  struct Unit {
    bool exists;
    int tile, lane, n, i;
    int64_t image;
    int plane, channel, t, s;  // s is the first of two columns
  };

  __device__ static Unit unit(int round, int64_t first_image) {
    const int index = round * THREADS + fresh_thread_index();
    const int part = index / kWarp % 4;
    Unit u;
    u.exists = index < kUnits;
    u.tile = index / (4 * kWarp);
    u.lane = index % kWarp;
    u.n = part & 1;
    u.i = part >> 1;
    u.plane = u.tile / kTilesPerPlane;
    u.channel = u.plane % CHANNELS;
    u.image = first_image + u.plane / CHANNELS;
    u.t = kTile * (u.tile / BLOCKS % BLOCKS) + lane_row(u.lane, u.i);
    u.s = kTile * (u.tile % BLOCKS) + lane_column(u.lane, u.n, 0);
    return u;
  }

  // Calls visit(quadrant, j, element offset) for the pixels of a unit that lie in the image.
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
      for (int j = 0; j < 2; ++j) {
        const int x = quadrant & 1 ? half_width + u.s + j : half_width - 1 - u.s - j;
        if (y >= 0 && y < geometry.height && x >= 0 && x < geometry.width)
          visit(quadrant, j, base + y * stride[2] + x * stride[3]);
      }
    }
  }

  // Starts both ends of every image row (at most two cache lines in the common layouts) on their way, which
  // costs no registers.
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

  // Reads the images, splits them into parities (half an orthonormal butterfly, which cannot overflow) and
  // stores float pairs: tile index parity * kTiles + tile. Raises maximum[image], the bits of a magnitude, to
  // the largest entry's: exact, in whatever order.
  __device__ static void load(float* memory, unsigned* maximum, const ImageView& view, const Geometry& geometry,
                              int64_t first_image) {
#pragma unroll 2
    for (int round = 0; round < kRounds; ++round) {
      const Unit u = unit(round, first_image);
      float corner[kParities][2] = {};
      with_elements<float>(view, [&](const auto* data) {
        visit_pixels(u, geometry, view.stride,
                     [&](int quadrant, int j, int64_t offset) { corner[quadrant][j] = widen(data[offset]); });
      });
      float2 parity[kParities];
      butterfly(corner, 0, parity[0].x, parity[1].x, parity[2].x, parity[3].x);
      butterfly(corner, 1, parity[0].y, parity[1].y, parity[2].y, parity[3].y);
      unsigned bits = 0;
#pragma unroll
      for (int p = 0; p < kParities; ++p) {
        bits = max(bits, max(magnitude_bits(parity[p].x), magnitude_bits(parity[p].y)));
        if (u.exists) *slot(memory, p, u) = parity[p];
      }
      bits = __reduce_max_sync(kAllLanes, bits);
      if (u.exists && u.lane == 0) atomicMax(maximum + u.plane / CHANNELS, bits);
    }
  }

  // Scales each image to its maximum, below 2^ceiling, and turns the thread's own pairs into operands.
  template <class FORWARD>
  __device__ static void convert(float* memory, const unsigned* maximum, int ceiling) {
#pragma unroll 2
    for (int round = 0; round < kRounds; ++round) {
      const Unit u = unit(round, 0);
      if (!u.exists) continue;
      const float scale = power_of_two(scaling_exponent(maximum[u.plane / CHANNELS], ceiling));
#pragma unroll
      for (int p = 0; p < kParities; ++p) {
        const float2 pair = *slot(memory, p, u);
        *reinterpret_cast<uint2*>(slot(memory, p, u)) = FORWARD::pair(pair.x * scale, pair.y * scale);
      }
    }
  }

  // Merges parity tiles of floats (tile index as above) and writes them, times factor 2^exponent and with
  // the scale of convert undone.
  __device__ static void write(float* memory, const unsigned* maximum, int ceiling, float factor, int exponent,
                               const ImageView& view, const Geometry& geometry, int64_t first_image) {
#pragma unroll 2
    for (int round = 0; round < kRounds; ++round) {
      const Unit u = unit(round, first_image);
      if (!u.exists) continue;
      float2 parity[kParities];
#pragma unroll
      for (int p = 0; p < kParities; ++p) parity[p] = *slot(memory, p, u);
      const int unscale = exponent - scaling_exponent(maximum[u.plane / CHANNELS], ceiling);
      with_elements<float>(view, [&](auto* data) {
        visit_pixels(u, geometry, view.stride, [&](int quadrant, int j, int64_t offset) {
          const float ee = j ? parity[0].y : parity[0].x, eo = j ? parity[1].y : parity[1].x;
          const float oe = j ? parity[2].y : parity[2].x, oo = j ? parity[3].y : parity[3].x;
          const float even = quadrant & 1 ? ee + eo : ee - eo;
          const float odd = quadrant & 1 ? oe + oo : oe - oo;
          const float sum = quadrant & 2 ? even + odd : even - odd;
          narrow(scale_by_power(sum * factor, unscale), data[offset]);
        });
      });
    }
  }

 private:
  __device__ static float2* slot(float* memory, int parity, const Unit& u) {
    return reinterpret_cast<float2*>(memory + (parity * kTiles + u.tile) * kTileEntries +
                                     pair_offset(u.lane, u.n, u.i));
  }

  __device__ static unsigned magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

  __device__ static void butterfly(const float (&corner)[kParities][2], int j, float& even_even, float& even_odd,
                                   float& odd_even, float& odd_odd) {
    const float right_even = 0.25f * corner[3][j] + 0.25f * corner[1][j];
    const float right_odd = 0.25f * corner[3][j] - 0.25f * corner[1][j];
    const float left_even = 0.25f * corner[2][j] + 0.25f * corner[0][j];
    const float left_odd = 0.25f * corner[2][j] - 0.25f * corner[0][j];
    even_even = right_even + left_even;
    even_odd = right_even - left_even;
    odd_even = right_odd + left_odd;
    odd_odd = right_odd - left_odd;
  }
};

}  // namespace sgr::cuda
