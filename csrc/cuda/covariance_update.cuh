// What follows the accumulation of a running covariance, in one block of threads, so that nothing waits for the host:
// sums at each displacement, their bins, the running average, its scale, the projection onto the semidefinite cone,
// the table and its spectrum. Small against the accumulation; in float64, as the general path.
//
// Tables are planes [pair][row][column] of `pitch` x `pitch` numbers; every transform contracts the rows and writes
// columns as rows, so that the next one takes the other axis.
#pragma once

#include <vector>

#include "../plan.h"
#include "semidefinite.cuh"
#include "spectrum_tiles.cuh"

namespace sgr::cuda {

constexpr int kUpdateThreads = 512;

// How displacements become bins: `linear` spreads a pair over two, `even` has one for each displacement.
enum class Binning { kRounded, kLinear, kEven };

// Where a cell of a table of displacements has its value: share of `bin`, the rest of the next one.
struct Cell {
  int bin;  // -1: beyond the last one
  double share;
};
// What a cell gives to a bin.
struct Member {
  int row, column;
  double share;
};

struct UpdateArguments {
  Geometry geometry;              // of the batch, and the frequencies of its spectrum
  int groups;                     // of sums
  const float *sums, *mean_sums;  // [group][pair][k][l], [group][channel][y][x]
  int pitch;                      // at or above all sizes, a multiple of 4
  int bins, cell_columns;         // of the values; columns of `cells`
  const int* first_member;        // [bins + 1]
  const Member* members;          // of all bins
  const double* pair_counts;      // [bins]
  const Cell* cells;              // [table row][cell_columns]
  int reach[2];                   // displacements of the values
  int table_size[2], spectrum_size[2];
  const double *to_reach[2], *periodic[2], *to_spectrum[2];  // of rows and columns, `transform_matrix`
  double decay, target_variance;                             // target_variance 0: none
  bool clip;
  float *values, *mean, *scale, *table, *spectrum, *arranged;  // the estimate's state; arranged may be null
  int64_t *updates, *skipped;
  int arranged_blocks;
  double* planes[2];           // workspace
  float *moment, *batch_mean;  // workspace: [pair][bin], [channel][y][x]
};

// Weights 1 for displacement zero and 2 for all others, by cos(pi step d (2k + 1) / (2F)) or, periodic, by
// cos(2 pi d k / (2N - 1)): [contracted][pitch].
enum class Contracted { kFrequency, kDisplacement, kPeriodic };
inline std::vector<double> transform_matrix(Contracted kind, int length, int columns, int pitch) {
  const bool periodic = kind == Contracted::kPeriodic;
  const Angles angles(periodic ? 2 * columns - 1 : (kind == Contracted::kFrequency ? length : columns));
  std::vector<double> matrix(static_cast<int64_t>(length) * pitch);
  for (int m = 0; m < length; ++m)
    for (int j = 0; j < columns; ++j) {
      const int64_t d = kind == Contracted::kFrequency ? j : m, k = kind == Contracted::kFrequency ? m : j;
      matrix[m * pitch + j] = (d > 0 ? 2.0 : 1.0) * angles.cosine(periodic ? 4 * d * k : d * (2 * k + 1));
    }
  return matrix;
}

// out[plane][r][j] = sum_m in[plane][m][r] matrix[m][j]. What lies beyond `rows` in an input row goes nowhere.
__device__ inline void contract(const double* in, double* out, const double* matrix, int planes, int pitch, int length,
                                int rows, int columns) {
  struct alignas(16) Quad {
    double value[4];
  };
  const int row_tiles = (rows + 3) / 4, tiles = row_tiles * ((columns + 3) / 4);
  for (int task = threadIdx.x; task < planes * tiles; task += kUpdateThreads) {
    const int plane = task / tiles, row = task % tiles % row_tiles * 4, column = task % tiles / row_tiles * 4;
    const double* left = in + plane * pitch * pitch + row;
    const double* right = matrix + column;
    double sum[4][4] = {};
#pragma unroll 4
    for (int m = 0; m < length; ++m, left += pitch, right += pitch) {
      const Quad a = *reinterpret_cast<const Quad*>(left), b = *reinterpret_cast<const Quad*>(right);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a.value[i] * b.value[j];
    }
    double* target = out + (plane * pitch + row) * pitch + column;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<Quad*>(target + i * pitch) = {{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}};
  }
  __syncthreads();
}

// state towards a batch's, as torch.lerp.
__device__ inline float moved(float state, float batch, float weight) {
  return weight < 0.5f ? state + weight * (batch - state) : batch - (batch - state) * (1.0f - weight);
}

template <int CHANNELS>
struct CovarianceUpdate {
  static constexpr int kPairs = CHANNELS * (CHANNELS + 1) / 2;

  const UpdateArguments& arguments;
  int* finite;  // in shared memory: whether the batch is
  double* shared_scale;

  // Calls visit(pair, row, column, place in a plane) for what falls to a thread.
  template <class Visit>
  __device__ void visit_planes(const int (&size)[2], Visit visit) const {
    const int count = size[0] * size[1], pitch = arguments.pitch;
    for (int index = threadIdx.x; index < kPairs * count; index += kUpdateThreads) {
      const int pair = index / count, row = index % count / size[1], column = index % size[1];
      visit(pair, row, column, (pair * pitch + row) * pitch + column);
    }
  }

  // planes[0] through both axes, back in planes[0].
  __device__ void transform(const double* const (&matrix)[2], const int (&from)[2], const int (&to)[2]) const {
    double* const(&planes)[2] = arguments.planes;
    contract(planes[0], planes[1], matrix[0], kPairs, arguments.pitch, from[0], from[1], to[0]);
    contract(planes[1], planes[0], matrix[1], kPairs, arguments.pitch, from[1], to[0], to[1]);
  }

  // Of `count` numbers for each (c, d) of a symmetric matrix.
  __device__ static void store(float* target, int pair, int count, int index, float value) {
    const ChannelPair<CHANNELS> channels(pair);
    target[channels.upper() * count + index] = value;
    target[channels.lower() * count + index] = value;
  }

  // The batch's second moment and mean, into the workspace, and whether all of it is finite.
  __device__ void find_moments() const {
    const Geometry& geometry = arguments.geometry;
    const int frequencies[2] = {geometry.rows, geometry.columns}, count = geometry.rows * geometry.columns;
    const int pixels = CHANNELS * geometry.height * geometry.width;
    visit_planes(frequencies, [&](int pair, int row, int column, int place) {
      double sum = 0.0;
      for (int group = 0; group < arguments.groups; ++group)
        sum += arguments.sums[(group * kPairs + pair) * count + row * geometry.columns + column];
      arguments.planes[0][place] = sum;
    });
    for (int pixel = threadIdx.x; pixel < pixels; pixel += kUpdateThreads) {
      double sum = 0.0;
      for (int group = 0; group < arguments.groups; ++group) sum += arguments.mean_sums[group * pixels + pixel];
      arguments.batch_mean[pixel] = static_cast<float>(sum / static_cast<double>(geometry.batch));
    }
    if (threadIdx.x == 0) *finite = 1;
    __syncthreads();
    transform(arguments.to_reach, frequencies, arguments.reach);
    const double weight = static_cast<double>(count) * static_cast<double>(geometry.batch);
    for (int index = threadIdx.x; index < kPairs * arguments.bins; index += kUpdateThreads) {
      const int bin = index % arguments.bins;
      const double* plane = arguments.planes[0] + index / arguments.bins * arguments.pitch * arguments.pitch;
      double sum = 0.0;
      for (int i = arguments.first_member[bin]; i < arguments.first_member[bin + 1]; ++i) {
        const Member member = arguments.members[i];
        sum += member.share * plane[member.row * arguments.pitch + member.column];
      }
      const float moment = static_cast<float>(sum / (arguments.pair_counts[bin] * weight));
      arguments.moment[index] = moment;
      if (!isfinite(moment)) *finite = 0;  // as it is wherever the mean is not
    }
    __syncthreads();
  }

  // A finite batch enters the running average; the first one is it.
  __device__ void average() const {
    const int pixels = CHANNELS * arguments.geometry.height * arguments.geometry.width;
    const float weight = *arguments.updates == 0 ? 1.0f : static_cast<float>(arguments.decay);
    const bool enters = *finite;
    for (int index = threadIdx.x; enters && index < kPairs * arguments.bins; index += kUpdateThreads) {
      const int pair = index / arguments.bins, bin = index % arguments.bins;
      const float before = arguments.values[ChannelPair<CHANNELS>(pair).upper() * arguments.bins + bin];
      store(arguments.values, pair, arguments.bins, bin, moved(before, arguments.moment[index], weight));
    }
    for (int pixel = threadIdx.x; enters && pixel < pixels; pixel += kUpdateThreads)
      arguments.mean[pixel] = moved(arguments.mean[pixel], arguments.batch_mean[pixel], weight);
    __syncthreads();
    if (threadIdx.x > 0) return;
    *arguments.updates += enters;
    *arguments.skipped += !enters;
    if (arguments.target_variance > 0.0) {
      float variance = 0.0f;
      for (int c = 0; c < CHANNELS; ++c) variance += arguments.values[(c * CHANNELS + c) * arguments.bins];
      const float ratio = static_cast<float>(arguments.target_variance) / (variance / CHANNELS);
      *arguments.scale = ratio > 0.0f && isfinite(ratio) ? ratio : 0.0f;
    }
    *shared_scale = *arguments.scale;
  }

  // The scaled values as a table of even displacements, in planes[0].
  __device__ void expand() const {
    visit_planes(arguments.table_size, [&](int pair, int row, int column, int place) {
      const Cell cell = arguments.cells[row * arguments.cell_columns + column];
      const float* values = arguments.values + ChannelPair<CHANNELS>(pair).upper() * arguments.bins;
      double value = 0.0;
      if (cell.bin >= 0) value = cell.share * values[cell.bin];
      if (cell.bin >= 0 && cell.bin + 1 < arguments.bins) value += (1.0 - cell.share) * values[cell.bin + 1];
      arguments.planes[0][place] = value * *shared_scale;
    });
    __syncthreads();
  }

  // planes[0] becomes semidefinite, up to the factor that is returned.
  __device__ double clip() const {
    const int (&size)[2] = arguments.table_size;
    const int area = arguments.pitch * arguments.pitch;
    transform(arguments.periodic, size, size);
    for (int index = threadIdx.x; index < size[0] * size[1]; index += kUpdateThreads) {
      double* place = arguments.planes[0] + index / size[1] * arguments.pitch + index % size[1];
      double block[kPairs];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) block[pair] = place[pair * area];
      keep_positive_part<CHANNELS>(block);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) place[pair * area] = block[pair];
    }
    __syncthreads();
    transform(arguments.periodic, size, size);
    const double factor = 1.0 / (static_cast<double>(2 * size[0] - 1) * (2 * size[1] - 1));
    if (arguments.target_variance == 0.0) return factor;
    double variance = 0.0;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) variance += arguments.planes[0][triangle<CHANNELS>(c, c) * area] * factor;
    variance /= CHANNELS;
    return factor * arguments.target_variance / (variance > 0.0 ? variance : 1.0);
  }

  __device__ void write_planes(float* target, const int (&size)[2], double factor) const {
    visit_planes(size, [&](int pair, int row, int column, int place) {
      store(target, pair, size[0] * size[1], row * size[1] + column,
            static_cast<float>(arguments.planes[0][place] * factor));
    });
  }

  __device__ void run() const {
    find_moments();
    average();
    __syncthreads();
    expand();
    const double factor = arguments.clip ? clip() : 1.0;
    write_planes(arguments.table, arguments.table_size, factor);
    transform(arguments.to_spectrum, arguments.table_size, arguments.spectrum_size);
    write_planes(arguments.spectrum, arguments.spectrum_size, factor);
    if (!arguments.arranged) return;
    if (arguments.arranged_blocks == 1)  // with a barrier first
      arrange<1>();
    else
      arrange<2>();
  }

  template <int BLOCKS>
  __device__ void arrange() const {
    const int (&size)[2] = arguments.spectrum_size;
    const int64_t plane = static_cast<int64_t>(size[0]) * size[1];
    Geometry geometry = arguments.geometry;
    geometry.rows = size[0];
    geometry.columns = size[1];
    SpectrumTiles<CHANNELS, BLOCKS, true>::arrange({arguments.spectrum, 1, 0, {CHANNELS * plane, plane, size[1], 1}},
                                                   geometry, reinterpret_cast<unsigned*>(finite), 0, 1,
                                                   arguments.arranged);
  }
};

template <int CHANNELS>
__global__ void __launch_bounds__(kUpdateThreads, 1)
    update_covariance(const __grid_constant__ UpdateArguments arguments) {
  SGR_SHARED_MEMORY(shared);
  double* scale = reinterpret_cast<double*>(shared);
  CovarianceUpdate<CHANNELS>{arguments, reinterpret_cast<int*>(scale + 1), scale}.run();
}

}  // namespace sgr::cuda
