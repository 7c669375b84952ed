// The transforms of the general path: any size, float32 on tensor cores and float64.
//
// Every transform contracts the last axis of its input and writes the transpose, so that all loads and stores
// run along rows: (c,y,x) -> U (r; c,l,y) -> Z (p,r; c,k,l), and Y (p,r; c,k,l) -> W (p; c,x,k) -> v (c,y,x).
#pragma once

#include "fragment.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

constexpr int kStagedThreads = 256;
constexpr int kSide = 64;  // of a block's output, in both directions
constexpr int kSideTiles = kSide / kTile;
constexpr int kStep = kTile;                          // along the contracted axis
constexpr int kStagedShared = 2 * 2 * kSide * kStep;  // numbers: constants and data of two parities

// cos and sin of (t + 1/2) theta_k over sqrt(F) for t < ceil(N/2), k < F: [parity][t][k], or [parity][k][t] for
// analyses. With sums and differences of mirrored pixels for input this is an orthonormal transform.
template <class T>
__global__ void fill_basis(T* basis, int pixels, int frequencies, bool by_frequency) {
  const int half = (pixels + 1) / 2;
  const int64_t size = static_cast<int64_t>(half) * frequencies;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= size) return;
  const int64_t t = by_frequency ? index % half : index / frequencies;
  const int64_t k = by_frequency ? index / half : index % frequencies;
  const int64_t period = 8 * static_cast<int64_t>(frequencies);
  double sine, cosine;
  sincospi(2.0 * static_cast<double>((2 * t + 1) * (2 * k + 1) % period) / static_cast<double>(period), &sine, &cosine);
  const double scale = 1.0 / sqrt(static_cast<double>(frequencies));
  basis[index] = static_cast<T>(cosine * scale);
  basis[size + index] = static_cast<T>(sine * scale);
}

// A block's eight warps share its 64 x 64 outputs, two 16 x 16 tiles each, 32 rows apart; tiles from
// `row_tiles` on are not wanted. Tiles in shared memory are laid out as by store_fragment: [parity][tile] of
// the constants, then of the data, whose rows are the output's columns.
template <class ARITHMETIC>
struct WarpProduct {  // float32, by ARITHMETIC's products
  using Number = float;
  Fragment sum[2][2];  // [parity][tile of output rows]

  __device__ void add(const float* shared, int warp, int lane, int row_tiles) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const float* constants = shared + (parity * kSideTiles + warp / kSideTiles) * kTileEntries;
      const float* data = shared + ((2 + parity) * kSideTiles + warp % kSideTiles) * kTileEntries;
      const auto b = ARITHMETIC::data(load_fragment(data, lane));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        if (warp / kSideTiles + 2 * tile >= row_tiles) continue;
        const auto a = ARITHMETIC::constant(load_fragment(constants + 2 * tile * kTileEntries, lane));
        sum[parity][tile] += ARITHMETIC::product(a, b);
      }
    }
  }
  __device__ float value(int parity, int tile, int n, int i, int j) const { return sum[parity][tile].at(n, i, j); }
};

__device__ inline int tile_position(int row, int column) {
  return pair_offset(row % 8 * 4 + column % 8 / 2, column / 8, row / 8) + column % 2;
}

struct WarpProductDouble {
  using Number = double;
  double sum[2][2][2][2][2];  // [parity][tile][n][i][j]

  __device__ void add(const double* shared, int warp, int lane, int row_tiles) {
    if (warp / kSideTiles >= row_tiles) return;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const double* constants = shared + (parity * kSideTiles + warp / kSideTiles) * kTileEntries;
      const double* data = shared + ((2 + parity) * kSideTiles + warp % kSideTiles) * kTileEntries;
#pragma unroll 4
      for (int k = 0; k < kStep; ++k)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const double b = data[tile_position(lane_column(lane, n, j), k)];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                sum[parity][tile][n][i][j] +=
                    constants[2 * tile * kTileEntries + tile_position(lane_row(lane, i), k)] * b;
          }
    }
  }
  __device__ double value(int parity, int tile, int n, int i, int j) const { return sum[parity][tile][n][i][j]; }
};

// Which entry of each tile column a thread brings to shared memory: (side, step) of the i-th of four.
struct Place {
  int side, step;
  __device__ explicit Place(int i)
      : side(static_cast<int>(threadIdx.x) / kStep + i * (kStagedThreads / kStep)),
        step(static_cast<int>(threadIdx.x) % kStep) {}
  __device__ int offset() const { return side / kTile * kTileEntries + tile_position(side % kTile, step); }
};
constexpr int kPlaces = kSide * kStep / kStagedThreads;

// Runs fetch(depth, constants, data) and multiplies, one step ahead of the products. The arrays are
// [parity][place].
template <class PRODUCT, class Fetch>
__device__ inline void contract(PRODUCT& product, typename PRODUCT::Number* shared, int length, int output_rows,
                                Fetch fetch) {
  using T = typename PRODUCT::Number;
  T constants[2][kPlaces], data[2][kPlaces];
  const int row_tiles = (output_rows + kTile - 1) / kTile;
  fetch(0, constants, data);
#pragma unroll 1
  for (int depth = 0; depth < length; depth += kStep) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity)
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
        shared[parity * kSideTiles * kTileEntries + Place(i).offset()] = constants[parity][i];
        shared[(2 + parity) * kSideTiles * kTileEntries + Place(i).offset()] = data[parity][i];
      }
    __syncthreads();
    if (depth + kStep < length) fetch(depth + kStep, constants, data);
    product.add(shared, threadIdx.x / kWarp, threadIdx.x % kWarp, row_tiles);
    __syncthreads();
  }
}

// Images as rows of pixels: row n is line n % height of channel image n / height.
template <class T>
struct ImageRows {
  ImageView view;
  int channels, height;
  int64_t first_image;

  __device__ int64_t offset(int64_t n) const {
    const int64_t plane = n / height;
    return (first_image + plane / channels) * view.stride[0] + plane % channels * view.stride[1] +
           n % height * view.stride[2];
  }
  __device__ int64_t stride() const { return view.stride[3]; }
  template <class Action>
  __device__ void with_data(Action action) const {
    with_elements<T>(view, action);
  }
};

template <class T>
struct DenseRows {
  const T* data;
  int length;

  __device__ int64_t offset(int64_t n) const { return n * length; }
  __device__ int64_t stride() const { return 1; }
  template <class Action>
  __device__ void with_data(Action action) const {
    action(data);
  }
};

// Targets take entry x of row n and, where there is one, of row n + 1; n is even.
template <class T>
struct DenseColumns {  // row n goes to column n % rows of matrix n / rows, which has `length` lines
  T* data;
  int rows, length;

  __device__ void store(int64_t n, bool both, int x, T first, T second) const {
    T* place = data + (n / rows * length + x) * rows + n % rows;
    if (rows % 2 == 0) {
      struct alignas(2 * sizeof(T)) Pair {
        T first, second;
      };
      *reinterpret_cast<Pair*>(place) = {first, second};
    } else {
      *place = first;
      if (both) data[((n + 1) / rows * length + x) * rows + (n + 1) % rows] = second;
    }
  }
};

struct ImageColumns {  // row n is column n % width of channel image n / width
  ImageView view;
  int channels, width;
  int64_t first_image;

  template <class T>
  __device__ void store(int64_t n, bool both, int y, T first, T second) const {
    with_elements<T>(view, [&](auto* data) {
      narrow(first, data[offset(n, y)]);
      if (both) narrow(second, data[offset(n + 1, y)]);
    });
  }

 private:
  __device__ int64_t offset(int64_t n, int y) const {
    const int64_t plane = n / width;
    return (first_image + plane / channels) * view.stride[0] + plane % channels * view.stride[1] + y * view.stride[2] +
           n % width * view.stride[3];
  }
};

// One step of an analysis: `count` rows of `pixels` entries, grouped into items of `rows`; output
// [parity][item][frequency][row].
template <class PRODUCT, class SOURCE>
__global__ void __launch_bounds__(kStagedThreads, 1)
    analyse(SOURCE source, const typename PRODUCT::Number* basis, typename PRODUCT::Number* output, int64_t count,
            int rows, int pixels, int frequencies) {
  using T = typename PRODUCT::Number;
  SGR_SHARED_MEMORY(shared);
  const int frequency_tiles = (frequencies + kSide - 1) / kSide;
  const int first_frequency = blockIdx.x % frequency_tiles * kSide;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / frequency_tiles) * kSide;
  const int half = (pixels + 1) / 2;
  int64_t line[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const int64_t n = first_row + Place(i).side;
    line[i] = n < count ? source.offset(n) : -1;
  }

  PRODUCT product = {};
  contract(product, reinterpret_cast<T*>(shared), half, frequencies - first_frequency,
           [&](int depth, auto& constants, auto& data) {
             const int t = depth + Place(0).step;
             source.with_data([&](const auto* elements) {
#pragma unroll
               for (int i = 0; i < kPlaces; ++i) {
                 T upper = 0, lower = 0;
                 if (line[i] >= 0 && t < half) {
                   if (half + t < pixels) upper = widen(elements[line[i] + (half + t) * source.stride()]);
                   lower = widen(elements[line[i] + (half - 1 - t) * source.stride()]);
                 }
                 data[0][i] = upper + lower;
                 data[1][i] = upper - lower;
               }
             });
#pragma unroll
             for (int i = 0; i < kPlaces; ++i) {
               const int k = first_frequency + Place(i).side;
#pragma unroll
               for (int parity = 0; parity < 2; ++parity)
                 constants[parity][i] = t < half && k < frequencies
                                            ? basis[(static_cast<int64_t>(parity) * frequencies + k) * half + t]
                                            : T(0);
             }
           });

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const DenseColumns<T> target{output, rows, frequencies};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int64_t row = first_row + warp % kSideTiles * kTile + lane_column(lane, n, 0);
    if (row >= count) continue;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int k = first_frequency + (warp / kSideTiles + 2 * tile) * kTile + lane_row(lane, i);
          if (k < frequencies)
            target.store(parity * count + row, row + 1 < count, k, product.value(parity, tile, n, i, 0),
                         product.value(parity, tile, n, i, 1));
        }
  }
}

// One step of a synthesis: row n = (outer, inner) has its even and odd coefficients at
// input + ((outer * 2 + parity) * inner_count + inner) * frequencies.
template <class PRODUCT, class TARGET>
__global__ void __launch_bounds__(kStagedThreads, 1)
    synthesise(const typename PRODUCT::Number* input, const typename PRODUCT::Number* basis, TARGET target,
               int64_t count, int64_t inner_count, int pixels, int frequencies) {
  using T = typename PRODUCT::Number;
  SGR_SHARED_MEMORY(shared);
  const int half = (pixels + 1) / 2;
  const int pixel_tiles = (half + kSide - 1) / kSide;
  const int first_pixel = blockIdx.x % pixel_tiles * kSide;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / pixel_tiles) * kSide;
  int64_t line[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const int64_t n = first_row + Place(i).side;
    line[i] = n < count ? (n / inner_count * 2 * inner_count + n % inner_count) * frequencies : -1;
  }

  PRODUCT product = {};
  contract(product, reinterpret_cast<T*>(shared), frequencies, half - first_pixel,
           [&](int depth, auto& constants, auto& data) {
             const int k = depth + Place(0).step;
#pragma unroll
             for (int i = 0; i < kPlaces; ++i) {
               const int t = first_pixel + Place(i).side;
#pragma unroll
               for (int parity = 0; parity < 2; ++parity) {
                 data[parity][i] =
                     line[i] >= 0 && k < frequencies ? input[line[i] + parity * inner_count * frequencies + k] : T(0);
                 constants[parity][i] = t < half && k < frequencies
                                            ? basis[(static_cast<int64_t>(parity) * half + t) * frequencies + k]
                                            : T(0);
               }
             }
           });

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int64_t row = first_row + warp % kSideTiles * kTile + lane_column(lane, n, 0);
    if (row >= count) continue;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = first_pixel + (warp / kSideTiles + 2 * tile) * kTile + lane_row(lane, i);
        if (t >= half) continue;
        T even[2], odd[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          even[j] = product.value(0, tile, n, i, j);
          odd[j] = product.value(1, tile, n, i, j);
        }
        if (half + t < pixels) target.store(row, row + 1 < count, half + t, even[0] + odd[0], even[1] + odd[1]);
        target.store(row, row + 1 < count, half - 1 - t, even[0] - odd[0], even[1] - odd[1]);
      }
  }
}

}  // namespace sgr::cuda
