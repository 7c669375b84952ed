// v = Sigma g and q = g' Sigma g of large images by fast Fourier transforms, in three passes over memory.
//
// The first kernel transforms rows of pixels; F complex numbers a row are left, in T. The second one takes columns of T:
// their real and imaginary parts are real lines that go the same way and never meet, as Lambda is real. It transforms
// them, multiplies with Lambda, adds up q and transforms back, in place. The third one brings rows back to pixels.
#pragma once

#include "fourier.cuh"
#include "tensor.cuh"

namespace sgr::cuda {

struct FourierArguments {
  ImageView gradient, product;
  SpectrumView<float> spectrum;
  Geometry geometry;
  FourierAxis row, column;  // along a row, along a column
  float4* arranged;         // Lambda / (Fh Fw): [block of columns][of SIDE / 4][pair][thread's place], four frequencies
  Complex* transformed;     // T: [image of this pass][channel][column][y]
  int pitch;                // of T's columns
  double* partial;          // of q: [image][block of columns], or null
  int64_t first;            // image of this pass
};

__device__ inline int folded(int frequency, int frequencies) {  // of the one with theta_2j or its conjugate
  return 2 * frequency < frequencies ? 2 * frequency : 2 * (frequencies - frequency) - 1;
}

// Rows of pixels to T: a block for kLines rows of a plane.
template <int SIDE>
__global__ void __launch_bounds__(kFourierThreads, 1) fourier_rows(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  const Fourier<SIDE> lines(arguments.row, shared);
  const Geometry& geometry = arguments.geometry;
  const int image = blockIdx.y / geometry.channels, channel = blockIdx.y % geometry.channels;
  const int y = blockIdx.x * lines.kLines + lines.line;
  lines.for_pixels(1, [&](auto radix, int set, int b) {
    Complex z[radix];
    with_elements<float>(arguments.gradient, [&](const auto* data) {
      const int64_t(&stride)[4] = arguments.gradient.stride;
      const auto* row = data + (arguments.first + image) * stride[0] + channel * stride[1] +
                        min(y, geometry.height - 1) * stride[2];
#pragma unroll
      for (int a = 0; a < radix; ++a) {
        const int x = b + lines.kSquare * a, further = x + lines.axis.frequencies;
        z[a].x = x < geometry.width ? widen(row[x * stride[3]]) : 0.0f;
        z[a].y = further < geometry.width ? widen(row[further * stride[3]]) : 0.0f;
      }
    });
    lines.analyse(set, b, z);
  });
  __syncthreads();
  Complex z[SIDE], *own = lines.region(0, lines.warp);
  lines.load(z, own);
  lines.transform(z, own);
  Complex* target =
      arguments.transformed +
      (static_cast<int64_t>(blockIdx.y) * geometry.columns + lines.warp + lines.axis.radix * lines.place) *
          arguments.pitch +
      y;
#pragma unroll
  for (int i = 0; i < SIDE; ++i) target[i * SIDE * lines.axis.radix * arguments.pitch] = z[i];
}

// T back to rows of pixels.
template <int SIDE>
__global__ void __launch_bounds__(kFourierThreads, 1)
    fourier_rows_back(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  const Fourier<SIDE> lines(arguments.row, shared);
  const Geometry& geometry = arguments.geometry;
  const int image = blockIdx.y / geometry.channels, channel = blockIdx.y % geometry.channels;
  const int y = blockIdx.x * lines.kLines + lines.line;
  Complex z[SIDE], *own = lines.region(0, lines.warp);
  const Complex* source =
      arguments.transformed +
      (static_cast<int64_t>(blockIdx.y) * geometry.columns + lines.warp + lines.axis.radix * lines.place) *
          arguments.pitch +
      y;
#pragma unroll
  for (int i = 0; i < SIDE; ++i) z[i] = swapped(source[i * SIDE * lines.axis.radix * arguments.pitch]);
  lines.transform(z, own);
  lines.store(z, own);
  __syncthreads();
  lines.for_pixels(1, [&](auto radix, int set, int b) {
    Complex z[radix];
    lines.synthesise(set, b, z);
    if (y >= geometry.height) return;
    with_elements<float>(arguments.product, [&](auto* data) {
      const int64_t(&stride)[4] = arguments.product.stride;
      auto* row = data + (arguments.first + image) * stride[0] + channel * stride[1] + y * stride[2];
#pragma unroll
      for (int a = 0; a < radix; ++a) {
        const int x = b + lines.kSquare * a, further = x + lines.axis.frequencies;
        if (x < geometry.width) narrow(z[a].x, row[x * stride[3]]);
        if (further < geometry.width) narrow(z[a].y, row[further * stride[3]]);
      }
    });
  });
}

template <int CHANNELS, bool SYMMETRIC>
constexpr int kFourierPairs = SYMMETRIC ? CHANNELS*(CHANNELS + 1) / 2 : CHANNELS* CHANNELS;

// Lambda as fourier_columns reads it; a block for each of the first two indices.
template <int SIDE, int CHANNELS, bool SYMMETRIC>
__global__ void arrange_fourier_spectrum(const __grid_constant__ FourierArguments arguments) {
  constexpr int kColumns = kWarp / SIDE / 2, kPairs = kFourierPairs<CHANNELS, SYMMETRIC>;
  const Geometry& geometry = arguments.geometry;
  const int radix = arguments.column.radix, thread = static_cast<int>(threadIdx.x), count = kColumns * SIDE * radix;
  if (thread >= count) return;
  const int group = blockIdx.x / (SIDE / 4), half = blockIdx.x % (SIDE / 4);
  const int place = thread / kColumns % SIDE, first = thread / kColumns / SIDE;
  const int l = folded(group * kColumns + thread % kColumns, geometry.columns);
  const float scale = 1.0f / (static_cast<float>(geometry.rows) * geometry.columns);
  int pair = 0;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
    for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
      float value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = folded(first + radix * (place + SIDE * (4 * half + i)), geometry.rows);
        value[i] = scale * (SYMMETRIC ? arguments.spectrum.symmetric_at(0, c, d, k, l)
                                      : arguments.spectrum.at(0, c, d, k, l));
      }
      arguments.arranged[(static_cast<int64_t>(blockIdx.x) * kPairs + pair++) * count + thread] =
          make_float4(value[0], value[1], value[2], value[3]);
    }
}

// Columns of T to those of Sigma's product, in place: a block for kLines real lines of an image, of all channels.
template <int SIDE, int CHANNELS, bool SYMMETRIC>
__global__ void __launch_bounds__(kFourierThreads, 1)
    fourier_columns(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  constexpr int kColumns = kWarp / SIDE / 2, kPairs = kFourierPairs<CHANNELS, SYMMETRIC>;
  const Fourier<SIDE> lines(arguments.column, shared);
  const Geometry& geometry = arguments.geometry;
  const int64_t step = 2 * static_cast<int64_t>(geometry.columns) * arguments.pitch;  // from channel to channel
  float* data = reinterpret_cast<float*>(arguments.transformed) + CHANNELS * step * blockIdx.y +
                2 * static_cast<int64_t>(blockIdx.x * kColumns + lines.line / 2) * arguments.pitch + lines.line % 2;
  lines.for_pixels(CHANNELS, [&](auto radix, int set, int b) {
    Complex z[radix];
    const float* column = data + set * step;
#pragma unroll
    for (int a = 0; a < radix; ++a) {
      const int y = b + lines.kSquare * a, further = y + lines.axis.frequencies;
      z[a].x = y < geometry.height ? column[2 * y] : 0.0f;
      z[a].y = further < geometry.height ? column[2 * further] : 0.0f;
    }
    lines.analyse(set, b, z);
  });
  __syncthreads();

  Complex z[CHANNELS][SIDE];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    lines.load(z[c], lines.region(c, lines.warp));
    lines.transform(z[c], lines.region(c, lines.warp));
  }
  const int count = kColumns * SIDE * lines.axis.radix;
  const float4* arranged = arguments.arranged + static_cast<int64_t>(blockIdx.x) * (SIDE / 4) * kPairs * count +
                           (lines.warp * SIDE + lines.place) * kColumns + lines.line / 2;
  float form = 0.0f;
#pragma unroll
  for (int half = 0; half < SIDE / 4; ++half) {
    float lambda[kPairs][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float4 four = arranged[(half * kPairs + pair) * count];
      lambda[pair][0] = four.x, lambda[pair][1] = four.y, lambda[pair][2] = four.z, lambda[pair][3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Complex y[CHANNELS] = {};
      int pair = 0;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
          const float entry = lambda[pair++][i];
          const Complex zc = z[c][4 * half + i], zd = z[d][4 * half + i];
          y[c] = make_float2(y[c].x + entry * zd.x, y[c].y + entry * zd.y);
          if (SYMMETRIC && c != d) y[d] = make_float2(y[d].x + entry * zc.x, y[d].y + entry * zc.y);
        }
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        form += y[c].x * z[c][4 * half + i].x + y[c].y * z[c][4 * half + i].y;
        z[c][4 * half + i] = swapped(y[c]);
      }
    }
  }
  double* forms = reinterpret_cast<double*>(shared + lines.shared_bytes(lines.axis.radix, CHANNELS));
  if (arguments.partial) {
    const double sum = warp_sum(static_cast<double>(form));
    if (threadIdx.x % kWarp == 0) forms[lines.warp] = sum;
  }
  if (arguments.product.data)
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      lines.transform(z[c], lines.region(c, lines.warp));
      lines.store(z[c], lines.region(c, lines.warp));
    }
  __syncthreads();
  if (arguments.partial && threadIdx.x == 0) {
    double sum = 0.0;
    for (int i = 0; i < lines.axis.radix; ++i) sum += forms[i];
    arguments.partial[(arguments.first + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
  }
  if (!arguments.product.data) return;
  lines.for_pixels(CHANNELS, [&](auto radix, int set, int b) {
    Complex z[radix];
    lines.synthesise(set, b, z);
    float* column = data + set * step;
#pragma unroll
    for (int a = 0; a < radix; ++a) {
      const int y = b + lines.kSquare * a, further = y + lines.axis.frequencies;
      if (y < geometry.height) column[2 * y] = z[a].x;
      if (further < geometry.height) column[2 * further] = z[a].y;
    }
  });
}

}  // namespace sgr::cuda
