// The general path: any number of channels, any size, float32 and float64, spectra of signed tables too. One
// kernel per step of the chain, with the transforms in device memory between them.
//
// Every transform contracts the last axis of its input and writes the transpose, so that all loads and stores
// run along rows: (c,y,x) -> U (r; c,l,y) -> Z (p,r; c,k,l), and Y (p,r; c,k,l) -> W (p; c,x,k) -> v (c,y,x).
#pragma once

#include "tensor.cuh"

namespace sgr::cuda {

constexpr int kStagedThreads = 256;
constexpr int kSide = 64;         // of a block's output tile
constexpr int kDepth = 16;        // of a step along the contracted axis
constexpr int kPer = kSide / 16;  // entries of a thread along each side

// cos and sin of (t + 1/2) theta_k over sqrt(F) for t < ceil(N/2), k < F: [parity][t][k]. With sums and
// differences of mirrored pixels for input this is an orthonormal transform.
template <class T>
__global__ void fill_basis(T* basis, int pixels, int frequencies) {
  const int half = (pixels + 1) / 2;
  const int64_t size = static_cast<int64_t>(half) * frequencies;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= size) return;
  const int64_t period = 8 * static_cast<int64_t>(frequencies);
  const int64_t turn = (2 * (index / frequencies) + 1) * (2 * (index % frequencies) + 1) % period;
  double sine, cosine;
  sincospi(2.0 * static_cast<double>(turn) / static_cast<double>(period), &sine, &cosine);
  const double scale = 1.0 / sqrt(static_cast<double>(frequencies));
  basis[index] = static_cast<T>(cosine * scale);
  basis[size + index] = static_cast<T>(sine * scale);
}

// Images as rows of pixels: row n is line n % height of channel image n / height.
struct ImageRows {
  ImageView view;
  int channels, height;
  int64_t first_image;

  __device__ int64_t offset(int64_t n) const {
    const int64_t plane = n / height;
    return (first_image + plane / channels) * view.stride[0] + plane % channels * view.stride[1] +
           n % height * view.stride[2];
  }
  template <class T, class Action>
  __device__ void with_row(int64_t n, Action action) const {
    with_elements<T>(view, [&](auto* data) { action(data + offset(n), view.stride[3]); });
  }
};

template <class T>
struct DenseRows {
  const T* data;
  int length;

  template <class, class Action>
  __device__ void with_row(int64_t n, Action action) const {
    action(data + n * length, int64_t{1});
  }
};

// One step of an analysis: `count` rows of `pixels` entries, grouped into items of `rows`; output
// [parity][item][frequency][row].
template <class T, class SOURCE>
__global__ void __launch_bounds__(kStagedThreads)
    analyse(SOURCE source, const T* basis, T* output, int64_t count, int rows, int pixels, int frequencies) {
  SGR_SHARED_MEMORY(shared);
  T(*constant)[kSide] = reinterpret_cast<T(*)[kSide]>(shared);
  T(*data)[kSide + 1] = reinterpret_cast<T(*)[kSide + 1]>(constant + kDepth);
  const int frequency_tiles = (frequencies + kSide - 1) / kSide;
  const int parity = blockIdx.y;
  const int first_frequency = blockIdx.x % frequency_tiles * kSide;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / frequency_tiles) * kSide;
  const int half = (pixels + 1) / 2;
  const int thread = threadIdx.x;
  basis += static_cast<int64_t>(parity) * half * frequencies;

  T sum[kPer][kPer] = {};
  for (int depth = 0; depth < half; depth += kDepth) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int t = depth + thread / kSide + i * (kStagedThreads / kSide);
      const int k = first_frequency + thread % kSide;
      constant[t - depth][thread % kSide] =
          t < half && k < frequencies ? basis[static_cast<int64_t>(t) * frequencies + k] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int t = depth + thread % kDepth, row = thread / kDepth + i * (kStagedThreads / kDepth);
      T upper = 0, lower = 0;
      if (t < half && first_row + row < count)
        source.template with_row<T>(first_row + row, [&](const auto* line, int64_t stride) {
          if (half + t < pixels) upper = widen(line[(half + t) * stride]);
          lower = widen(line[(half - 1 - t) * stride]);
        });
      data[thread % kDepth][row] = parity ? upper - lower : upper + lower;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kDepth; ++t)
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j) sum[i][j] += constant[t][thread / 16 + 16 * i] * data[t][thread % 16 + 16 * j];
    __syncthreads();
  }

  const int64_t items = count / rows;
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int64_t n = first_row + thread % 16 + 16 * j;
    if (n >= count) continue;
    T* column = output + (parity * items + n / rows) * frequencies * static_cast<int64_t>(rows) + n % rows;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int k = first_frequency + thread / 16 + 16 * i;
      if (k < frequencies) column[static_cast<int64_t>(k) * rows] = sum[i][j];
    }
  }
}

// Where a synthesis writes pixel x of row n.
struct ImageColumns {  // row n is column n % width of channel image n / width
  ImageView view;
  int channels, width;
  int64_t first_image;

  template <class T>
  __device__ void store(int64_t n, int y, T value) const {
    const int64_t plane = n / width;
    const int64_t offset = (first_image + plane / channels) * view.stride[0] + plane % channels * view.stride[1] +
                           y * view.stride[2] + n % width * view.stride[3];
    with_elements<T>(view, [&](auto* data) { narrow(value, data[offset]); });
  }
};

template <class T>
struct DenseColumns {  // [item][pixel][row]
  T* data;
  int rows, pixels;

  template <class>
  __device__ void store(int64_t n, int x, T value) const {
    data[(n / rows * pixels + x) * rows + n % rows] = value;
  }
};

// One step of a synthesis: row n = (outer, inner) has its even and odd coefficients at
// input + (outer * 2 + parity) * inner_count * frequencies + inner * frequencies.
template <class T, class TARGET>
__global__ void __launch_bounds__(kStagedThreads)
    synthesise(const T* input, const T* basis, TARGET target, int64_t count, int64_t inner_count, int pixels,
               int frequencies) {
  SGR_SHARED_MEMORY(shared);
  using Tile = T[kDepth][kSide + 1];
  Tile* constant = reinterpret_cast<Tile*>(shared);  // [parity]
  Tile* data = constant + 2;
  const int half = (pixels + 1) / 2;
  const int pixel_tiles = (half + kSide - 1) / kSide;
  const int first_pixel = blockIdx.x % pixel_tiles * kSide;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / pixel_tiles) * kSide;
  const int thread = threadIdx.x;

  T sum[2][kPer][kPer] = {};
  for (int depth = 0; depth < frequencies; depth += kDepth) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int k = depth + thread % kDepth, side = thread / kDepth + i * (kStagedThreads / kDepth);
      const int64_t n = first_row + side;
      const int64_t pair = n / inner_count * 2 * inner_count + n % inner_count;
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const bool has_row = k < frequencies && n < count, has_pixel = k < frequencies && first_pixel + side < half;
        data[parity][thread % kDepth][side] = has_row ? input[(pair + parity * inner_count) * frequencies + k] : T(0);
        constant[parity][thread % kDepth][side] =
            has_pixel ? basis[(static_cast<int64_t>(parity) * half + first_pixel + side) * frequencies + k] : T(0);
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int parity = 0; parity < 2; ++parity)
#pragma unroll
        for (int i = 0; i < kPer; ++i)
#pragma unroll
          for (int j = 0; j < kPer; ++j)
            sum[parity][i][j] += constant[parity][k][thread / 16 + 16 * i] * data[parity][k][thread % 16 + 16 * j];
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int64_t n = first_row + thread % 16 + 16 * j;
    if (n >= count) continue;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int t = first_pixel + thread / 16 + 16 * i;
      if (t >= half) continue;
      if (half + t < pixels) target.template store<T>(n, half + t, sum[0][i][j] + sum[1][i][j]);
      target.template store<T>(n, half - 1 - t, sum[0][i][j] - sum[1][i][j]);
    }
  }
}

// What part `part` of a spectrum multiplies in parity (p, r): the coefficient of the parity flipped in the
// directions in which the part is odd, with a sign: an odd part takes (cos, sin) to (sin, -cos).
__device__ inline int flipped_parity(int parity, int part) {
  return parity ^ ((part & 1) << 1) ^ (part >> 1);  // part bit 0: odd in y, parity bit 1
}
template <class T>
__device__ inline T flip_sign(int parity, int part) {
  const bool negative = ((part & 1) && (parity & 2)) != ((part & 2) && (parity & 1));
  return negative ? T(-1) : T(1);
}

// Coefficients as [p][r][image][channel][k][l].
template <class T>
struct Coefficients {
  T* data;
  int64_t images;
  int channels;
  int64_t plane;  // Fh * Fw

  __device__ T& at(int parity, int64_t image, int channel, int64_t frequency) const {
    return data[((parity * images + image) * channels + channel) * plane + frequency];
  }
};

// Y = Lambda Z, a block per (image, channel, run of frequencies), and the block's part of q. A null output is
// not written.
template <class T, bool SYMMETRIC>
__global__ void mix_channels(Coefficients<T> z, SpectrumView<T> spectrum, int columns, Coefficients<T> y,
                             double* partial) {
  SGR_SHARED_MEMORY(shared);
  const int64_t runs = (z.plane + blockDim.x - 1) / blockDim.x;
  const int64_t image = blockIdx.x / runs / z.channels;
  const int channel = blockIdx.x / runs % z.channels;
  const int64_t frequency = blockIdx.x % runs * blockDim.x + threadIdx.x;
  T form = 0;
  if (frequency < z.plane) {
    const int k = frequency / columns, l = frequency % columns;
    T sum[4] = {};
    for (int d = 0; d < z.channels; ++d) {
      T coefficient[4];
#pragma unroll
      for (int parity = 0; parity < 4; ++parity) coefficient[parity] = z.at(parity, image, d, frequency);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        if (part >= spectrum.parts) break;
        const T entry = SYMMETRIC ? spectrum.symmetric_at(part, channel, d, k, l) : spectrum.at(part, channel, d, k, l);
#pragma unroll
        for (int parity = 0; parity < 4; ++parity)
          sum[parity] += entry * flip_sign<T>(parity, part) * coefficient[flipped_parity(parity, part)];
      }
    }
#pragma unroll
    for (int parity = 0; parity < 4; ++parity) {
      form += sum[parity] * z.at(parity, image, channel, frequency);
      if (y.data) y.at(parity, image, channel, frequency) = sum[parity];
    }
  }
  if (!partial) return;
  double* sums = reinterpret_cast<double*>(shared);
  const double total = warp_sum(static_cast<double>(form));
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += sums[warp];
  partial[blockIdx.x] = sum;
}

// q of an image from the parts of its blocks, in order; a warp per image.
template <class T>
__global__ void sum_quadratic(const double* partial, int64_t parts, T* quadratic) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kWarp) sum += partial[blockIdx.x * parts + i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) quadratic[blockIdx.x] = static_cast<T>(sum);
}

// S (+)= sum over images and parities of Z^a_c Z^b_c', a thread per entry of (parts,C,C,Fh,Fw): in order.
template <class T>
__global__ void correlate_channels(Coefficients<T> a, Coefficients<T> b, int parts, bool accumulate, T* result) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t channels = a.channels;
  if (index >= parts * channels * channels * a.plane) return;
  const int64_t frequency = index % a.plane;
  const int d = index / a.plane % channels, c = index / (a.plane * channels) % channels;
  const int part = index / (a.plane * channels * channels);
  double sum = accumulate ? static_cast<double>(result[index]) : 0.0;
  for (int64_t image = 0; image < a.images; ++image) {
    T of_image = 0;
#pragma unroll
    for (int parity = 0; parity < 4; ++parity)
      of_image += a.at(parity, image, c, frequency) * flip_sign<T>(parity, part) *
                  b.at(flipped_parity(parity, part), image, d, frequency);
    sum += static_cast<double>(of_image);
  }
  result[index] = static_cast<T>(sum);
}

}  // namespace sgr::cuda
