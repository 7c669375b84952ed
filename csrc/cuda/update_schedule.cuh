// A running covariance's update in two launches: the accumulation, and all that follows it.
#pragma once

#include "covariance_update.cuh"
#include "schedule.cuh"

namespace sgr::cuda {

// The settings and the state of an estimate: everything is dense.
struct Estimate {
  Binning binning;
  int bins[2];  // length of the values: {K, 1}, or (h, w)
  double decay, target_variance;
  bool clip;
  float *values, *mean, *scale, *table, *spectrum;
  float* arranged;  // arranged_words() of the image's size and the spectrum's, or null
  int64_t *updates, *skipped;
  unsigned* arrivals;
  int table_size[2], spectrum_size[2];
};

// Which bins a displacement falls into.
inline Cell cell_of(const Estimate& estimate, int row, int column) {
  const int (&bins)[2] = estimate.bins;
  if (estimate.binning == Binning::kEven) return {row < bins[0] && column < bins[1] ? row * bins[1] + column : -1, 1.0};
  const double distance = std::sqrt(static_cast<double>(row * row + column * column));
  const int below = static_cast<int>(std::floor(estimate.binning == Binning::kRounded ? distance + 0.5 : distance));
  return {below < bins[0] ? below : -1, estimate.binning == Binning::kRounded ? 1.0 : 1.0 - (distance - below)};
}

// What the bins of an image's displacements are made of, one after the other.
struct Bins {
  std::vector<int> first_member{0};
  std::vector<Member> members;
  std::vector<double> pair_counts;

  Bins(const Estimate& estimate, const Geometry& geometry, const int (&reach)[2]) {
    std::vector<std::vector<Member>> of_bin(estimate.bins[0] * estimate.bins[1]);
    for (int row = 0; row < reach[0]; ++row)
      for (int column = 0; column < reach[1]; ++column) {
        const Cell cell = cell_of(estimate, row, column);
        if (cell.bin < 0) continue;
        of_bin[cell.bin].push_back({row, column, cell.share});
        if (cell.share < 1.0 && cell.bin + 1 < static_cast<int>(of_bin.size()))
          of_bin[cell.bin + 1].push_back({row, column, 1.0 - cell.share});
      }
    for (const std::vector<Member>& bin : of_bin) {
      double pairs = 0.0;
      for (const Member& member : bin)
        pairs += member.share * (geometry.height - member.row) * (geometry.width - member.column) *
                 (member.row > 0 ? 2 : 1) * (member.column > 0 ? 2 : 1);
      members.insert(members.end(), bin.begin(), bin.end());
      first_member.push_back(static_cast<int>(members.size()));
      pair_counts.push_back(pairs);
    }
  }
};

template <int CHANNELS, class LAUNCHER>
void launch_update(LAUNCHER& launcher, UpdateArguments& arguments) {
  constexpr int64_t kPairs = CHANNELS * (CHANNELS + 1) / 2;
  const Geometry& geometry = arguments.geometry;
  for (double*& planes : arguments.planes)
    planes = launcher.template workspace<double>(kPairs * arguments.pitch * arguments.pitch);
  arguments.moment = launcher.template workspace<float>(kPairs * arguments.bins);
  arguments.batch_mean = launcher.template workspace<float>(int64_t{CHANNELS} * geometry.height * geometry.width);
  launcher.launch(update_covariance<CHANNELS>, 1, 1, kUpdateThreads, 16, arguments);
}

// Of up to four channels and 64 pixels a side; false where a block has too little shared memory.
template <class LAUNCHER>
bool compute_update(LAUNCHER& launcher, const ImageView& perturbation, const Estimate& estimate, Precision precision,
                    Geometry geometry) {
  UpdateArguments arguments{};
  const int size[2] = {geometry.height, geometry.width};
  for (int axis = 0; axis < 2; ++axis) {
    const int displacements = estimate.bins[estimate.binning == Binning::kEven ? axis : 0];
    arguments.reach[axis] = std::min(size[axis], displacements);
    (axis == 0 ? geometry.rows : geometry.columns) = std::max(1, (size[axis] + arguments.reach[axis]) / 2);
  }
  GroupSums groups{estimate.arrivals, 0, nullptr, nullptr};
  if (!fused_accumulation(launcher, perturbation, precision, nullptr, &groups, geometry)) return false;

  arguments.geometry = geometry;
  arguments.groups = groups.groups;
  arguments.sums = groups.sums;
  arguments.mean_sums = groups.mean_sums;
  int largest = 1;
  for (int axis = 0; axis < 2; ++axis) {
    arguments.table_size[axis] = estimate.table_size[axis];
    arguments.spectrum_size[axis] = estimate.spectrum_size[axis];
    largest = std::max({largest, size[axis], estimate.table_size[axis], estimate.spectrum_size[axis]});
  }
  arguments.pitch = (std::max({largest, geometry.rows, geometry.columns}) + 3) / 4 * 4;
  const auto matrix = [&](Contracted kind, int length, int columns) {
    const int64_t sizes = int64_t{length} << 32 | columns;
    return launcher.template constants<double>({static_cast<int64_t>(kind), sizes, arguments.pitch}, [&] {
      return transform_matrix(kind, length, columns, arguments.pitch);
    });
  };
  for (int axis = 0; axis < 2; ++axis) {
    const int table = estimate.table_size[axis];
    arguments.to_reach[axis] =
        matrix(Contracted::kFrequency, axis == 0 ? geometry.rows : geometry.columns, arguments.reach[axis]);
    if (estimate.clip) arguments.periodic[axis] = matrix(Contracted::kPeriodic, table, table);
    arguments.to_spectrum[axis] = matrix(Contracted::kDisplacement, table, estimate.spectrum_size[axis]);
  }

  const std::array<int64_t, 3> key{int64_t{geometry.height} << 32 | geometry.width,
                                   int64_t{estimate.bins[0]} << 32 | estimate.bins[1],
                                   static_cast<int64_t>(estimate.binning)};
  const auto bins = [&] { return Bins(estimate, geometry, arguments.reach); };
  arguments.bins = estimate.bins[0] * estimate.bins[1];
  arguments.first_member = launcher.template constants<int>(key, [&] { return bins().first_member; });
  arguments.members = launcher.template constants<Member>(key, [&] { return bins().members; });
  arguments.pair_counts = launcher.template constants<double>(key, [&] { return bins().pair_counts; });
  arguments.cell_columns = size[1];
  arguments.cells = launcher.template constants<Cell>(key, [&] {
    std::vector<Cell> cells;
    for (int row = 0; row < size[0]; ++row)
      for (int column = 0; column < size[1]; ++column) cells.push_back(cell_of(estimate, row, column));
    return cells;
  });

  arguments.decay = estimate.decay;
  arguments.target_variance = estimate.target_variance;
  arguments.clip = estimate.clip;
  arguments.values = estimate.values;
  arguments.mean = estimate.mean;
  arguments.scale = estimate.scale;
  arguments.table = estimate.table;
  arguments.spectrum = estimate.spectrum;
  arguments.arranged = estimate.arranged;
  arguments.arranged_blocks = fused_blocks(geometry);
  arguments.updates = estimate.updates;
  arguments.skipped = estimate.skipped;
  return with_number<4>(geometry.channels, [&](auto channels) {
    launch_update<channels>(launcher, arguments);
    return true;
  });
}

}  // namespace sgr::cuda
