// S = sum over samples and parities of Z Z' of images up to 64x64 with up to four channels.
//
// A warp owns two 16x16 blocks of frequencies of S for the kernel's whole life and keeps them in registers;
// each block of threads writes one partial sum, and the partial sums are added in a fixed order: no atomics,
// and as the number of blocks depends on the shape alone, the same bits on every GPU.
#pragma once

#include "image_tiles.cuh"
#include "spectrum_tiles.cuh"

namespace sgr::cuda {

struct CrossSpectrumArguments {
  ImageView perturbation;
  float* partial;         // [gridDim.x][pair][row block][column block][16x16 as store_fragment]
  const uint32_t* basis;  // what BasisTiles::table built
  Geometry geometry;

  // Null, or: sums by groups of `group` blocks, each added by the last one to come, in the order of the blocks.
  float* sums;          // [group][pair][k][l], times the number of frequencies
  float* mean_sums;     // [group][channel][y][x]: of the images
  float* mean_partial;  // [gridDim.x][channel][y][x]
  unsigned* arrivals;   // [group], zero, and left so
  int group;
};

// In float64, of every `step`-th part.
__device__ inline double sum_in_order(const float* partial, int stride, int begin, int end, int step) {
  double sum = 0.0;
#pragma unroll 4
  for (int part = begin; part < end; part += step) sum += partial[static_cast<int64_t>(part) * stride];
  return sum;
}

template <class PRECISION, int CHANNELS, int BLOCKS>
struct FusedCrossSpectrum {
  using Forward = typename PRECISION::Forward;
  using Axis = FrequencyAxis<BLOCKS>;
  using Basis = BasisTiles<PRECISION, BLOCKS>;
  using Layout = SpectrumTiles<CHANNELS, BLOCKS, true>;
  static constexpr int kBlocks = Axis::kBlocks;
  static constexpr int kOwned = 2;  // blocks of row frequencies per warp
  static constexpr int kWarps = 8;
  static constexpr int kWarpsPerImage = kBlocks * kBlocks / kOwned;
  static constexpr int kImages = kWarps / kWarpsPerImage;  // at a time
  static constexpr int kThreads = kWarps * kWarp;
  // Four channels have more pairs than registers: two blocks of threads share them out.
  static constexpr int kParts = CHANNELS > 3 ? 2 : 1;
  static constexpr int kPairs = Layout::kPairs / kParts;
  using Images = ImageTiles<kImages, CHANNELS, BLOCKS, kThreads>;

  static constexpr int kImageWords = kParities * Images::kTiles * kTileEntries;
  static constexpr int kReductionWords = kImages > 1 ? Layout::kEntries / kParts : 0;
  static constexpr int kDataWords = kImageWords > kReductionWords ? kImageWords : kReductionWords;
  static constexpr int kSharedBytes = 4 * (kDataWords + kImages * Images::kRoom + Basis::kWords + 4 + 2 * kImages);
  static constexpr int kCeiling = BLOCKS == 1 ? 8 : 7;

  uint32_t* data;
  float* staging;
  Basis basis;
  uint64_t* barriers;  // of the arriving images and of the basis
  unsigned* maxima;    // [2][kImages]
  int lane, group, row_member, column_block, part;

  __device__ FusedCrossSpectrum(unsigned char* shared)
      : basis(reinterpret_cast<uint32_t*>(shared) + kDataWords + kImages * Images::kRoom, nullptr,
              threadIdx.x % kWarp) {
    const int warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    group = warp / kWarpsPerImage;
    row_member = warp / kBlocks % (kBlocks / kOwned);
    column_block = warp % kBlocks;
    part = blockIdx.y;
    data = reinterpret_cast<uint32_t*>(shared);
    staging = reinterpret_cast<float*>(data + kDataWords);
    barriers = reinterpret_cast<uint64_t*>(staging + kImages * Images::kRoom + Basis::kWords);
    maxima = reinterpret_cast<unsigned*>(barriers + 2);
  }

  static_assert(kPairs * kParts == Layout::kPairs);

  // Adds this warp's image to its blocks of S.
  __device__ void add_image(Fragment (&sum)[kOwned][kPairs], float unscale) const {
#pragma unroll 1
    for (int parity = 0; parity < kParities; ++parity) {
      Fragment z[kOwned][CHANNELS] = {};
      transform(z, parity);
#pragma unroll
      for (int owned = 0; owned < kOwned; ++owned) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) z[owned][c] *= unscale;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
#pragma unroll
          for (int d = c; d < CHANNELS; ++d) {
            const int pair = Layout::pair(c, d);
            if (kParts > 1 && pair / kPairs != part) continue;
            sum[owned][pair % kPairs].add_product(z[owned][c], z[owned][d]);
          }
      }
    }
  }

  __device__ void transform(Fragment (&z)[kOwned][CHANNELS], int parity) const {
    typename Forward::Constant row_constant[BLOCKS];
#pragma unroll
    for (int s = 0; s < BLOCKS; ++s) row_constant[s] = basis.forward(1, parity & 1, column_block, s);
#pragma unroll
    for (int t = 0; t < BLOCKS; ++t) {
      typename Forward::Constant column_constant[kOwned];
#pragma unroll
      for (int owned = 0; owned < kOwned; ++owned)
        column_constant[owned] = basis.forward(0, parity >> 1, row_member * kOwned + owned, t);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const int tile = ((group * CHANNELS + c) * BLOCKS + t) * BLOCKS;
        Fragment rows{};
#pragma unroll
        for (int s = 0; s < BLOCKS; ++s) {
          typename Forward::Tile x;
          load_tile(x, data + (parity * Images::kTiles + tile + s) * kTileEntries, lane);
          Forward::multiply(rows, row_constant[s], x);
        }
        const typename Forward::Tile u = Forward::data(rows);
#pragma unroll
        for (int owned = 0; owned < kOwned; ++owned) Forward::multiply(z[owned][c], column_constant[owned], u);
      }
    }
  }

  __device__ int offset(int pair, int owned) const {
    return Layout::offset(pair, row_member * kOwned + owned, column_block);
  }

  // Adds the groups' sums in order through shared memory; the first group ends up with the total.
  __device__ void reduce_groups(Fragment (&sum)[kOwned][kPairs]) const {
    float* memory = reinterpret_cast<float*>(data);
#pragma unroll 1
    for (int from = kImages - 1; from > 0; --from) {
#pragma unroll
      for (int index = 0; index < kOwned * kPairs; ++index)
        if (group == from)
          store_fragment(sum[index / kPairs][index % kPairs], memory + offset(index % kPairs, index / kPairs), lane);
      __syncthreads();
#pragma unroll
      for (int index = 0; index < kOwned * kPairs; ++index)
        if (group == from - 1)
          sum[index / kPairs][index % kPairs] += load_fragment(memory + offset(index % kPairs, index / kPairs), lane);
    }  // a thread next writes where it has just read
  }

  // Adds the images in the staging area to the block's sum of them, which has no room in registers.
  __device__ void add_pixels(const CrossSpectrumArguments& arguments, int64_t first, bool is_first) const {
    const Geometry& geometry = arguments.geometry;
    const int pixels = CHANNELS * geometry.height * geometry.width;
    float* mean = arguments.mean_partial + static_cast<int64_t>(blockIdx.x) * pixels;
#pragma unroll 4
    for (int pixel = part * kThreads + threadIdx.x; pixel < pixels; pixel += kParts * kThreads) {
      float sum = is_first ? 0.0f : mean[pixel];
#pragma unroll
      for (int image = 0; image < kImages; ++image)
        if (image == 0 || first + image < geometry.batch) sum += staging[image * Images::kRoom + pixel];
      mean[pixel] = sum;
    }
  }

  // Adds the partial sums of this block's group, if all of them are there.
  __device__ void sum_group(const CrossSpectrumArguments& arguments) const {
    const int group = blockIdx.x / arguments.group, begin = group * arguments.group;
    const int end = min(begin + arguments.group, static_cast<int>(gridDim.x));
    if (!last_to_arrive(arguments.arrivals + group, (end - begin) * gridDim.y, reinterpret_cast<unsigned*>(data)))
      return;
    const Geometry& geometry = arguments.geometry;
    const int plane = geometry.rows * geometry.columns, pixels = CHANNELS * geometry.height * geometry.width;
    for (int index = threadIdx.x; index < Layout::kEntries; index += kThreads) {
      const SpectrumPlace<BLOCKS> place(index % Layout::kSlots, geometry);
      if (!place.exists()) continue;
      const float sum = static_cast<float>(sum_in_order(arguments.partial + index, Layout::kEntries, begin, end, 1));
      arguments.sums[(group * Layout::kPairs + index / Layout::kSlots) * plane + place.position(geometry)] = sum;
    }
    for (int index = threadIdx.x; index < pixels; index += kThreads)
      arguments.mean_sums[group * pixels + index] =
          static_cast<float>(sum_in_order(arguments.mean_partial + index, pixels, begin, end, 1));
  }

  __device__ void run(const CrossSpectrumArguments& arguments) {
    const Geometry& geometry = arguments.geometry;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kImages;
    int64_t first = static_cast<int64_t>(blockIdx.x) * kImages;

    Arrival arrival{barriers}, constants{barriers + 1};
    arrival.prepare();
    constants.prepare();
    if (threadIdx.x < 2 * kImages) maxima[threadIdx.x] = 0;
    __syncthreads();
    constants.expect(4 * Basis::kWords);
    constants.copy(const_cast<uint32_t*>(basis.tiles.tiles), arguments.basis, 4 * Basis::kWords);
    Images::send(staging, arguments.perturbation, geometry, first, arrival);
    constants.wait();

    Fragment sum[kOwned][kPairs] = {};
    unsigned* maximum = maxima;
    while (first < geometry.batch) {
      Images::receive(staging, arguments.perturbation, geometry, first, arrival);
      if (arguments.sums) add_pixels(arguments, first, first == static_cast<int64_t>(blockIdx.x) * kImages);
      typename Images::Entries entries;
      Images::load(entries, maximum, staging, geometry, first);
      __syncthreads();
      Images::send(staging, arguments.perturbation, geometry, first + stride, arrival);
      Images::template store<Forward>(entries, maximum, kCeiling, data);
      unsigned* next_maximum = maximum == maxima ? maxima + kImages : maxima;
      if (threadIdx.x < kImages) next_maximum[threadIdx.x] = 0;
      __syncthreads();
      add_image(sum, power_of_two(-scaling_exponent(maximum[group], kCeiling)));
      first += stride;
      maximum = next_maximum;
      __syncthreads();
    }
    reduce_groups(sum);
    float* partial = arguments.partial + static_cast<int64_t>(blockIdx.x) * Layout::kEntries;
#pragma unroll
    for (int index = 0; index < kOwned * kPairs; ++index)
      if (group == 0)
        store_fragment(sum[index / kPairs][index % kPairs],
                       partial + offset(part * kPairs + index % kPairs, index / kPairs), lane);
    if (arguments.sums) sum_group(arguments);
  }
};

template <class FUSED>
__global__ void __launch_bounds__(FUSED::kThreads, 1)
    fused_cross_spectrum(const __grid_constant__ CrossSpectrumArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  FUSED fused(shared);
  fused.run(arguments);
}

// Adds the partial sums in float64, in order, and puts them in the order of the result (C,C,Fh,Fw). A block
// of kWarp x kReductionRows threads finishes kWarp entries.
constexpr int kReductionRows = 8;

template <int CHANNELS, int BLOCKS>
__global__ void sum_partial_spectra(const float* partial, int count, Geometry geometry, float* result) {
  using Layout = SpectrumTiles<CHANNELS, BLOCKS, true>;
  SGR_SHARED_MEMORY(shared);
  double* sums = reinterpret_cast<double*>(shared);
  const int column = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int index = blockIdx.x * kWarp + column;
  double sum = sum_in_order(partial + index, Layout::kEntries, row, count, kReductionRows);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0) return;
  for (int r = 1; r < kReductionRows; ++r) sum += sums[r * kWarp + column];

  const SpectrumPlace<BLOCKS> place(index % Layout::kSlots, geometry);
  if (!place.exists()) return;
  const ChannelPair<CHANNELS> channels(index / Layout::kSlots);
  const int64_t plane = static_cast<int64_t>(geometry.rows) * geometry.columns;
  const float value = static_cast<float>(sum / static_cast<double>(plane));
  result[channels.upper() * plane + place.position(geometry)] = value;
  result[channels.lower() * plane + place.position(geometry)] = value;
}

}  // namespace sgr::cuda
