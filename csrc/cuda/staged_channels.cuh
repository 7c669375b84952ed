// The general path between its transforms: channels mix frequency by frequency, spectra of signed tables too.
#pragma once

#include "tensor.cuh"

namespace sgr::cuda {

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
