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

// A thread's pixels of a line, from pixel b on, and those F further where a line is so long; load(s): pixel b + s.
template <int STEP, int R, class Load>
__device__ inline void load_line(Complex (&z)[R], int pixels, int frequencies, int b, const Load& load) {
#pragma unroll
  for (int a = 0; a < R; ++a) z[a].x = b + STEP * a < pixels ? load(STEP * a) : 0.0f;
  if (pixels <= frequencies) return;
#pragma unroll
  for (int a = 0; a < R; ++a) z[a].y = b + STEP * a + frequencies < pixels ? load(STEP * a + frequencies) : 0.0f;
}
template <int STEP, int R, class Store>
__device__ inline void store_line(const Complex (&z)[R], int pixels, int frequencies, int b, const Store& store) {
#pragma unroll
  for (int a = 0; a < R; ++a)
    if (b + STEP * a < pixels) store(STEP * a, z[a].x);
  if (pixels <= frequencies) return;
#pragma unroll
  for (int a = 0; a < R; ++a)
    if (b + STEP * a + frequencies < pixels) store(STEP * a + frequencies, z[a].y);
}

// A block's rows of pixels and their columns of T; a block for kLines rows of a plane.
template <int SIDE, class Element>
struct FourierRows {
  const FourierArguments& arguments;
  Fourier<SIDE> lines;
  int y;

  __device__ FourierRows(const FourierArguments& a, unsigned char* shared)
      : arguments(a), lines(a.row, shared), y(blockIdx.x * lines.kLines + lines.line) {}

  // From pixel b of the row on; of the last row beyond it.
  __device__ Element* pixels(const ImageView& view, int b) const {
    const Geometry& geometry = arguments.geometry;
    const int image = blockIdx.y / geometry.channels, channel = blockIdx.y % geometry.channels;
    return kept(static_cast<Element*>(view.data) + (arguments.first + image) * view.stride[0] +
                channel * view.stride[1] + min(y, geometry.height - 1) * view.stride[2] + b * view.stride[3]);
  }
  __device__ Complex* transformed() const {
    const int64_t column = static_cast<int64_t>(blockIdx.y) * arguments.geometry.columns + lines.warp;
    return arguments.transformed + (column + lines.axis.radix * lines.place) * arguments.pitch + y;
  }
  __device__ int step() const { return SIDE * lines.axis.radix * arguments.pitch; }  // to a thread's next column
};

// Rows of pixels to T.
template <int SIDE, class Element>
__global__ void __launch_bounds__(kFourierThreads, 2) fourier_rows(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  const FourierRows<SIDE, Element> rows(arguments, shared);
  const Fourier<SIDE>& lines = rows.lines;
  const int width = arguments.row.pixels, frequencies = arguments.row.frequencies;
  lines.for_pixels(1, [&](auto radix, int set, int b) {
    Complex z[radix.value];
    const int step = static_cast<int>(arguments.gradient.stride[3]);
    const Element* row = rows.pixels(arguments.gradient, b);
    load_line<lines.kSquare>(z, width, frequencies, b, [&](int x) { return widen(row[x * step]); });
    lines.analyse(set, b, z);
  });
  __syncthreads();
  Complex z[SIDE], *own = lines.region(0, lines.warp), *target = rows.transformed();
  lines.load(z, own);
  lines.transform(z, own);
#pragma unroll
  for (int i = 0; i < SIDE; ++i) target[i * rows.step()] = z[i];
}

// T back to rows of pixels.
template <int SIDE, class Element>
__global__ void __launch_bounds__(kFourierThreads, 2)
    fourier_rows_back(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  const FourierRows<SIDE, Element> rows(arguments, shared);
  const Fourier<SIDE>& lines = rows.lines;
  const int width = arguments.row.pixels, frequencies = arguments.row.frequencies;
  Complex z[SIDE], *own = lines.region(0, lines.warp);
  const Complex* source = rows.transformed();
#pragma unroll
  for (int i = 0; i < SIDE; ++i) z[i] = swapped(source[i * rows.step()]);
  lines.transform(z, own);
  lines.store(z, own);
  __syncthreads();
  lines.for_pixels(1, [&](auto radix, int set, int b) {
    Complex z[radix.value];
    lines.synthesise(set, b, z);
    if (rows.y >= arguments.geometry.height) return;
    const int step = static_cast<int>(arguments.product.stride[3]);
    Element* row = rows.pixels(arguments.product, b);
    store_line<lines.kSquare>(z, width, frequencies, b, [&](int x, float value) { narrow(value, row[x * step]); });
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
  const int height = arguments.column.pixels, frequencies = arguments.column.frequencies;
  const int64_t step = 2 * static_cast<int64_t>(geometry.columns) * arguments.pitch;  // from channel to channel
  float* data = reinterpret_cast<float*>(arguments.transformed) + CHANNELS * step * blockIdx.y +
                2 * static_cast<int64_t>(blockIdx.x * kColumns + lines.line / 2) * arguments.pitch + lines.line % 2;
  lines.for_pixels(CHANNELS, [&](auto radix, int set, int b) {
    Complex z[radix.value];
    const float* column = data + set * step + 2 * b;
    load_line<lines.kSquare>(z, height, frequencies, b, [&](int y) { return column[2 * y]; });
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
  double* forms = reinterpret_cast<double*>(lines.memory + CHANNELS * lines.axis.radix * lines.kRegion);
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
    Complex z[radix.value];
    lines.synthesise(set, b, z);
    float* column = data + set * step + 2 * b;
    store_line<lines.kSquare>(z, height, frequencies, b, [&](int y, float value) { column[2 * y] = value; });
  });
}

}  // namespace sgr::cuda
