// v = Sigma g and q = g' Sigma g of large images by fast Fourier transforms, in three passes over memory.
//
// The first kernel transforms rows of pixels; F complex numbers a row are left, in T. The second one takes columns of
// T: their real and imaginary parts are real lines that go the same way and never meet, as Lambda is real. It
// transforms them, multiplies with Lambda, adds up q and transforms back, in place. The third one brings rows back to
// pixels.
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

constexpr int kRowSets = 2;  // of kLines rows of a plane, that a block takes: enough for its warps

// A block's rows of pixels and their columns of T.
template <int SIDE, class Element>
struct FourierRows {
  const FourierArguments& arguments;
  Fourier<SIDE> lines;

  __device__ FourierRows(const FourierArguments& a, unsigned char* shared, int thread)
      : arguments(a), lines(a.row, shared, thread) {}

  __device__ int y(int set) const { return (blockIdx.x * kRowSets + set) * lines.kLines + lines.line; }
  // From pixel b of the row on; of the last row beyond it.
  __device__ Element* pixels(const ImageView& view, int set, int b) const {
    const Geometry& geometry = arguments.geometry;
    const int image = blockIdx.y / geometry.channels, channel = blockIdx.y % geometry.channels;
    return kept(static_cast<Element*>(view.data) + (arguments.first + image) * view.stride[0] +
                channel * view.stride[1] + min(y(set), geometry.height - 1) * view.stride[2] + b * view.stride[3]);
  }
  __device__ Complex* transformed(int set) const {
    const int64_t column = static_cast<int64_t>(blockIdx.y) * arguments.geometry.columns + lines.warp;
    return arguments.transformed + (column + lines.axis.radix * lines.place) * arguments.pitch + y(set);
  }
  __device__ int step() const { return SIDE * lines.axis.radix * arguments.pitch; }  // to a thread's next column
};

// Rows of pixels to T. Each step finds its places anew: registers are for the numbers.
template <int SIDE, class Element>
__global__ void __launch_bounds__(Fourier<SIDE>::kThreads, 2)
    fourier_rows(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  const FourierRows<SIDE, Element> before(arguments, shared, threadIdx.x);
  before.lines.template for_pixels<kRowSets>([&](auto radix, int set, int b) {
    const int step = static_cast<int>(arguments.gradient.stride[3]);
    const Element* row = before.pixels(arguments.gradient, set, b);
    before.lines.template analyse<radix.value>(set, b, [&](int x) { return widen(row[x * step]); });
  });
  __syncthreads();
  const FourierRows<SIDE, Element> after(arguments, shared, fresh_thread_index());
  const auto turns = after.lines.turns();
#pragma unroll
  for (int set = 0; set < kRowSets; ++set) {
    Complex z[SIDE], *own = after.lines.region(set, after.lines.warp), *target = after.transformed(set);
    after.lines.load(z, own, turns);
    after.lines.transform(z, own, turns);
#pragma unroll
    for (int i = 0; i < SIDE; ++i) target[i * after.step()] = z[i];
  }
}

// T back to rows of pixels.
template <int SIDE, class Element>
__global__ void __launch_bounds__(Fourier<SIDE>::kThreads, 2)
    fourier_rows_back(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  const FourierRows<SIDE, Element> before(arguments, shared, threadIdx.x);
  const auto turns = before.lines.turns();
#pragma unroll
  for (int set = 0; set < kRowSets; ++set) {
    Complex z[SIDE], *own = before.lines.region(set, before.lines.warp);
    const Complex* source = before.transformed(set);
#pragma unroll
    for (int i = 0; i < SIDE; ++i) z[i] = swapped(source[i * before.step()]);
    before.lines.transform(z, own, turns);
    before.lines.store(z, own, turns);
  }
  __syncthreads();
  const FourierRows<SIDE, Element> after(arguments, shared, fresh_thread_index());
  after.lines.template for_pixels<kRowSets>([&](auto radix, int set, int b) {
    if (after.y(set) >= arguments.geometry.height) return;
    const int step = static_cast<int>(arguments.product.stride[3]);
    Element* row = after.pixels(arguments.product, set, b);
    after.lines.template synthesise<radix.value>(set, b, [&](int x, float value) { narrow(value, row[x * step]); });
  });
}

template <int CHANNELS, bool SYMMETRIC>
constexpr int kFourierPairs = SYMMETRIC ? CHANNELS * (CHANNELS + 1) / 2 : CHANNELS * CHANNELS;

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
        value[i] =
            scale * (SYMMETRIC ? arguments.spectrum.symmetric_at(0, c, d, k, l) : arguments.spectrum.at(0, c, d, k, l));
      }
      arguments.arranged[(static_cast<int64_t>(blockIdx.x) * kPairs + pair++) * count + thread] =
          make_float4(value[0], value[1], value[2], value[3]);
    }
}

// A block's columns of T: kLines real lines of an image, of all channels.
template <int SIDE>
struct FourierColumns {
  static constexpr int kColumns = kWarp / SIDE / 2;
  const FourierArguments& arguments;
  Fourier<SIDE> lines;

  __device__ FourierColumns(const FourierArguments& a, unsigned char* shared, int thread)
      : arguments(a), lines(a.column, shared, thread) {}

  __device__ float* pixels(int channel, int b) const {
    const Geometry& geometry = arguments.geometry;
    const int64_t plane = static_cast<int64_t>(blockIdx.y) * geometry.channels + channel;
    const int64_t column = plane * geometry.columns + blockIdx.x * kColumns + lines.line / 2;
    return kept(reinterpret_cast<float*>(arguments.transformed + column * arguments.pitch + b) + lines.line % 2);
  }
};

// Columns of T to those of Sigma's product, in place. Each step finds its places anew: registers are for the numbers.
template <int SIDE, int CHANNELS, bool SYMMETRIC>
__global__ void __launch_bounds__(Fourier<SIDE>::kThreads, SIDE == 4 ? 2 : 1)
    fourier_columns(const __grid_constant__ FourierArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  using Columns = FourierColumns<SIDE>;
  const Columns before(arguments, shared, threadIdx.x);
  before.lines.template for_pixels<CHANNELS>([&](auto radix, int set, int b) {
    const float* column = before.pixels(set, b);
    before.lines.template analyse<radix.value>(set, b, [&](int y) { return column[2 * y]; });
  });
  __syncthreads();

  const Fourier<SIDE> lines(arguments.column, shared, fresh_thread_index());
  Complex z[CHANNELS][SIDE];
  const auto turns = lines.turns();
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    lines.load(z[c], lines.region(c, lines.warp), turns);
    lines.transform(z[c], lines.region(c, lines.warp), turns);
  }
  constexpr int kPairs = kFourierPairs<CHANNELS, SYMMETRIC>;
  const int count = Columns::kColumns * SIDE * lines.axis.radix;
  const float4* arranged = arguments.arranged + static_cast<int64_t>(blockIdx.x) * (SIDE / 4) * kPairs * count +
                           (lines.warp * SIDE + lines.place) * Columns::kColumns + lines.line / 2;
  float form = 0.0f;
#pragma unroll
  for (int half = 0; half < SIDE / 4; ++half) {
    Complex y[CHANNELS][4] = {};
    int pair = half * kPairs;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int d = SYMMETRIC ? c : 0; d < CHANNELS; ++d) {
        const float4 four = arranged[pair++ * count];
        const float lambda[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[c][i] = y[c][i] + lambda[i] * z[d][4 * half + i];
          if (SYMMETRIC && c != d) y[d][i] = y[d][i] + lambda[i] * z[c][4 * half + i];
        }
      }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Complex& value = z[c][4 * half + i];
        if (SYMMETRIC) form += y[c][i].x * value.x + y[c][i].y * value.y;  // q is of symmetric matrices
        value = swapped(y[c][i]);
      }
  }
  double* forms = reinterpret_cast<double*>(lines.memory + CHANNELS * lines.axis.radix * lines.kRegion);
  if (SYMMETRIC && arguments.partial) {
    const double sum = warp_sum(static_cast<double>(form));
    if (threadIdx.x % kWarp == 0) forms[lines.warp] = sum;
  }
  if (arguments.product.data) {
    const auto again = lines.turns();
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      lines.transform(z[c], lines.region(c, lines.warp), again);
      lines.store(z[c], lines.region(c, lines.warp), again);
    }
  }
  __syncthreads();
  if (SYMMETRIC && arguments.partial && threadIdx.x == 0) {
    double sum = 0.0;
    for (int i = 0; i < lines.axis.radix; ++i) sum += forms[i];
    arguments.partial[(arguments.first + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
  }
  if (!arguments.product.data) return;
  const Columns after(arguments, shared, fresh_thread_index());
  after.lines.template for_pixels<CHANNELS>([&](auto radix, int set, int b) {
    float* column = after.pixels(set, b);
    after.lines.template synthesise<radix.value>(set, b, [&](int y, float value) { column[2 * y] = value; });
  });
}

}  // namespace sgr::cuda
