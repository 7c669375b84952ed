// Images in and out of shared memory, split about their centre into four parities of 16x16 tiles.
//
// Parity 2p + r is odd in y where p = 1 and odd in x where r = 1. Images pass through a staging area, where they lie as
// they do densely in device memory; a dense one is copied there while a block still computes the one before.
#pragma once

#include "basis.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

constexpr int kParities = 4;

// IMAGES images of CHANNELS planes of up to 32 BLOCKS pixels a side, moved by THREADS threads, a tile of each parity by
// 128 of them in a round. A thread has two columns of a row, in each of the four mirrored quadrants.
template <int IMAGES, int CHANNELS, int BLOCKS, int THREADS>
struct ImageTiles {
  static constexpr int kPlanes = IMAGES * CHANNELS;
  static constexpr int kTilesPerPlane = BLOCKS * BLOCKS;
  static constexpr int kTiles = kPlanes * kTilesPerPlane;  // of one parity
  static constexpr int kThreadsPerTile = kTileEntries / 2;
  static constexpr int kTilesPerRound = THREADS / kThreadsPerTile;
  static constexpr int kRounds = kTiles / kTilesPerRound;
  static constexpr int kRoom = kParities * CHANNELS * kTilesPerPlane * kTileEntries;  // floats of one image
  static_assert(kRounds * kTilesPerRound == kTiles);

  // What a thread moves: columns (n, j) of row i of a lane's fragment of a tile.
  struct Place {
    int tile, plane, image, lane, n, i, t, s;  // row and column in the half image
  };

  // By round, parity or quadrant, and column.
  struct Entries {
    float value[kRounds][kParities][2];
  };

  // A round differs from the next by what is known when this is compiled, as far as a tile's threads are all there are.
  __device__ static Place place(int round) {
    const unsigned thread = fresh_thread_index();
    const unsigned pair = thread % 8, group = thread / 16 % 8;
    const unsigned tile = round * kTilesPerRound + (thread / kThreadsPerTile & (kTilesPerRound - 1));
    Place p;
    p.tile = tile;
    p.plane = tile / kTilesPerPlane;
    p.image = IMAGES == 1 ? 0 : tile / (kTilesPerPlane * CHANNELS);
    p.n = pair / 4;
    p.i = thread / 8 % 2;
    p.lane = 4 * group + pair % 4;
    p.t = kTile * (tile / BLOCKS % BLOCKS) + group + 8 * p.i;
    p.s = kTile * (tile % BLOCKS) + 2 * pair;
    return p;
  }

  // Sends dense images from `first` on their way; the staging area has been read.
  __device__ static void send(float* staging, const ImageView& view, const Geometry& geometry, int64_t first,
                              const Arrival& arrival) {
    if (!view.dense || first >= geometry.batch) return;
    const int count = first + IMAGES <= geometry.batch ? IMAGES : static_cast<int>(geometry.batch - first);
    const int bytes = static_cast<int>(sizeof(float)) * CHANNELS * geometry.height * geometry.width;
    arrival.expect(count * bytes);
    const float* source = static_cast<const float*>(view.data) + first * view.stride[0];
#pragma unroll
    for (int i = 0; i < IMAGES; ++i)
      if (i < count) arrival.copy(staging + i * kRoom, source + i * view.stride[0], bytes);
  }

  // Calls visit(element of a view, its place in the staging area) for what falls to a thread.
  template <class Visit>
  __device__ static void visit_pixels(float* staging, const ImageView& view, const Geometry& geometry, int64_t first,
                                      Visit visit) {
    const int thread = static_cast<int>(fresh_thread_index());
    with_elements<float>(view, [&](auto* data) {
#pragma unroll 1
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int64_t image = first + plane / CHANNELS;
        if (image >= geometry.batch) return;
        auto* source = data + image * view.stride[0] + plane % CHANNELS * view.stride[1];
        float* target = staging + plane / CHANNELS * kRoom + plane % CHANNELS * geometry.height * geometry.width;
#pragma unroll 1
        for (int y = thread / kWarp; y < geometry.height; y += THREADS / kWarp)
#pragma unroll 1
          for (int x = thread % kWarp; x < geometry.width; x += kWarp)
            visit(source[y * view.stride[2] + x * view.stride[3]], target[y * geometry.width + x]);
      }
    });
  }

  // Waits for what was sent, or gathers images of another layout.
  __device__ static void receive(float* staging, const ImageView& view, const Geometry& geometry, int64_t first,
                                 Arrival& arrival) {
    if (view.dense) return arrival.wait();
    visit_pixels(staging, view, geometry, first, [](auto& element, float& place) { place = widen(element); });
    __syncthreads();
  }

  // Calls visit(quadrant, position of column s, pixel s exists, pixel s + 1 exists) for a place's row in the four
  // mirrored quadrants of its plane; quadrants 2 and 3 are below the centre, 1 and 3 right of it, where s + 1 follows
  // s.
  template <class Visit>
  __device__ static void visit_quadrants(const Place& p, const Geometry& geometry, Visit visit) {
    const int width = geometry.width, half_width = (width + 1) / 2, half_height = (geometry.height + 1) / 2;
    const int lower = half_height + p.t, upper = half_height - 1 - p.t;
    const int plane = p.image * kRoom + (p.plane - p.image * CHANNELS) * geometry.height * width;
#pragma unroll
    for (int quadrant = 0; quadrant < kParities; ++quadrant) {
      const bool row = quadrant & 2 ? lower < geometry.height : upper >= 0;
      const int line = (quadrant & 2 ? lower : upper) * width + half_width + (quadrant & 1 ? p.s : -1 - p.s);
      const int columns = quadrant & 1 ? width - half_width : half_width;
      visit(quadrant, plane + line, row && p.s < columns, row && p.s + 1 < columns);
    }
  }

  // PAIRS: where two columns are one aligned access. Pixels outside of the image are zero.
  template <bool PAIRS>
  __device__ static void read_quadrants(float (&corner)[kParities][2], const float* images, const Place& p,
                                        const Geometry& geometry) {
    visit_quadrants(p, geometry, [&](int quadrant, int position, bool first, bool second) {
      float (&pixels)[2] = corner[quadrant];
      pixels[0] = pixels[1] = 0.0f;
      const bool right = quadrant & 1;
      if constexpr (PAIRS) {
        if (!first) return;
        const float2 pair = *reinterpret_cast<const float2*>(images + (right ? position : position - 1));
        pixels[0] = right ? pair.x : pair.y;
        pixels[1] = right ? pair.y : pair.x;
      } else {
        if (first) pixels[0] = images[position];
        if (second) pixels[1] = images[right ? position + 1 : position - 1];
      }
    });
  }
  template <bool PAIRS>
  __device__ static void write_quadrants(const float (&pixels)[kParities][2], float* images, const Place& p,
                                         const Geometry& geometry) {
    visit_quadrants(p, geometry, [&](int quadrant, int position, bool first, bool second) {
      const float (&values)[2] = pixels[quadrant];
      const bool right = quadrant & 1;
      if constexpr (PAIRS) {
        if (first)
          *reinterpret_cast<float2*>(images + (right ? position : position - 1)) =
              right ? make_float2(values[0], values[1]) : make_float2(values[1], values[0]);
      } else {
        if (first) images[position] = values[0];
        if (second) images[right ? position + 1 : position - 1] = values[1];
      }
    });
  }

  // Splits the images into parities (twice an orthonormal butterfly) and raises maximum[image], the bits of a
  // magnitude, to the largest entry's: exact, in whatever order. NaNs are left out; they need no scale.
  __device__ static void load(Entries& entries, unsigned* maximum, const float* staging, const Geometry& geometry,
                              int64_t first) {
    const bool pairs = geometry.width % 4 == 0;
    if (pairs)
      read<true>(entries, staging, geometry, first);
    else
      read<false>(entries, staging, geometry, first);
    float largest = 0.0f;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const Place p = place(round);
      auto& value = entries.value[round];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float lower_even = value[3][j] + value[2][j], lower_odd = value[3][j] - value[2][j];
        const float upper_even = value[1][j] + value[0][j], upper_odd = value[1][j] - value[0][j];
        const float parity[kParities] = {lower_even + upper_even, lower_odd + upper_odd, lower_even - upper_even,
                                         lower_odd - upper_odd};
#pragma unroll
        for (int p = 0; p < kParities; ++p) {
          value[p][j] = parity[p];
          largest = fmaxf(largest, fabsf(parity[p]));
        }
      }
      if (IMAGES > 1 || round == kRounds - 1) {
        raise_maximum(maximum + p.image, largest);
        largest = 0.0f;
      }
    }
  }

  // Scales each image to its maximum, below 2^ceiling, and stores operands: tile index parity * kTiles + tile.
  template <class FORWARD>
  __device__ static void store(const Entries& entries, const unsigned* maximum, int ceiling, uint32_t* memory) {
    float scale = 1.0f;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const Place p = place(round);
      if (IMAGES > 1 || round == 0) scale = power_of_two(scaling_exponent(maximum[p.image], ceiling));
#pragma unroll
      for (int parity = 0; parity < kParities; ++parity) {
        const float (&value)[2] = entries.value[round][parity];
        FORWARD::store_pair(memory + (parity * kTiles + p.tile) * kTileEntries, p.lane, p.n, p.i, value[0] * scale,
                            value[1] * scale);
      }
    }
  }

  // Merges parity tiles of floats (tile index as above) into images in their place, times factor 2^exponent and with
  // the scale of store undone, and writes them.
  __device__ static void write(float* memory, const unsigned* maximum, int ceiling, float factor, int exponent,
                               const ImageView& view, const Geometry& geometry, int64_t first) {
    Entries pixels;  // of quadrants
    PowerOfTwo unscale(0);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const Place p = place(round);
      if (IMAGES > 1 || round == 0) unscale = PowerOfTwo(exponent - scaling_exponent(maximum[p.image], ceiling));
      float2 parity[kParities];
#pragma unroll
      for (int q = 0; q < kParities; ++q)
        parity[q] = *reinterpret_cast<const float2*>(memory + (q * kTiles + p.tile) * kTileEntries +
                                                     pair_offset(p.lane, p.n, p.i));
      const float scale = factor * unscale.first;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const auto entry = [&](int q) { return j ? parity[q].y : parity[q].x; };
        const float even_right = entry(0) + entry(1), even_left = entry(0) - entry(1);
        const float odd_right = entry(2) + entry(3), odd_left = entry(2) - entry(3);
        const float quadrants[kParities] = {even_left - odd_left, even_right - odd_right, even_left + odd_left,
                                            even_right + odd_right};
#pragma unroll
        for (int quadrant = 0; quadrant < kParities; ++quadrant)
          pixels.value[round][quadrant][j] = quadrants[quadrant] * scale;
      }
      if (__builtin_expect(unscale.second != 1.0f, 0))
#pragma unroll
        for (int e = 0; e < 2 * kParities; ++e) pixels.value[round][e / 2][e % 2] *= unscale.second;
    }
    __syncthreads();
    const bool pairs = geometry.width % 4 == 0;
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
      if (pairs)
        write_quadrants<true>(pixels.value[round], memory, place(round), geometry);
      else
        write_quadrants<false>(pixels.value[round], memory, place(round), geometry);
    __syncthreads();
    if (!view.dense) {
      visit_pixels(memory, view, geometry, first, [](auto& element, float& place) { narrow(place, element); });
      return;
    }
    const int size = CHANNELS * geometry.height * geometry.width;
    float* target = static_cast<float*>(view.data) + first * view.stride[0];
    for (int i = 0; i < IMAGES && first + i < geometry.batch; ++i)
      for (int index = 4 * static_cast<int>(fresh_thread_index()); index < size; index += 4 * THREADS)
        *reinterpret_cast<float4*>(target + i * view.stride[0] + index) =
            *reinterpret_cast<const float4*>(memory + i * kRoom + index);
  }

 private:
  template <bool PAIRS>
  __device__ static void read(Entries& entries, const float* staging, const Geometry& geometry, int64_t first) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const Place p = place(round);
      auto& corner = entries.value[round];
      if (IMAGES == 1 || first + p.image < geometry.batch) {
        read_quadrants<PAIRS>(corner, staging, p, geometry);
      } else {
#pragma unroll
        for (int quadrant = 0; quadrant < kParities; ++quadrant) corner[quadrant][0] = corner[quadrant][1] = 0.0f;
      }
    }
  }
};

}  // namespace sgr::cuda
