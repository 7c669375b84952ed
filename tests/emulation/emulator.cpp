// Runs the CUDA kernels of csrc/cuda on the CPU: reads cases from a file,
// writes results to another. The schedule (which kernels, in what order, with
// what workspace) is the product's own.
//
//   emulator CASES RESULTS [ascending|descending]
//   emulator lengths
//
// The second one prints the numbers of frequencies that have Fourier transforms.
// A case is kFields int64 followed by the storages of a, of b (cross_spectrum
// of two tensors) and of the spectrum. Results follow each other without
// headers: q, then v (contiguous), or S. kHasB of products: an arranged spectrum
// follows. What is arranged has an image of zeros. An update has kUpdateFields int64 more,
// then decay, target variance, and the state, which is the result. The number of
// launches comes last.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "update_schedule.cuh"

namespace {

using namespace sgr::cuda;

enum Field {
  kOperator,  // 0 product, 1 quadratic_form, 2 quadratic_form without product, 3
              // cross_spectrum, 4 update, 5 arrange
  kPrecision,
  kElement,
  kBatch,
  kChannels,
  kHeight,
  kWidth,
  kRows,
  kColumns,
  kParts,
  kSharedLimit,
  kOffset,
  kStride,
  kStorage = kStride + 4,  // elements of a's storage (and b's); negative: only images are given, dense, to be put there
  kHasB,
  kSpectrumStride,
  kFields = kSpectrumStride + 4
};

enum UpdateField { kBinning, kBins, kClip = kBins + 2, kTableSize, kSpectrumSize = kTableSize + 2, kUpdateFields = kSpectrumSize + 2 };

// An allocation of exact size, so that AddressSanitizer guards its ends; filled
// with NaN.
struct Buffer {
  explicit Buffer(int64_t bytes, bool filled = true)
      : size(bytes), data(filled ? std::malloc(bytes) : std::calloc(bytes, 1), std::free) {
    if (filled) std::memset(data.get(), 0xff, bytes);
  }
  int64_t size;
  std::unique_ptr<void, void (*)(void*)> data;
};

void read(std::FILE* file, void* data, int64_t bytes) {
  if (std::fread(data, 1, bytes, file) != static_cast<size_t>(bytes)) {
    std::fprintf(stderr, "emulator: truncated case\n");
    std::exit(2);
  }
}

int64_t launches = 0;

struct EmulatedLauncher {
  int shared_limit;
  std::vector<Buffer> buffers;
  int multiprocessors = 3;  // few, so that blocks work on several images one after the other

  template <class Kernel>
  int64_t resident_blocks(Kernel, int, int) {
    return multiprocessors;
  }
  template <class T>
  T* workspace(int64_t count) {
    buffers.emplace_back(count * static_cast<int64_t>(sizeof(T)));
    return static_cast<T*>(buffers.back().data.get());
  }
  template <class T, class Build>
  const T* constants(const std::array<int64_t, 3>&, Build build) {
    const std::vector<T> table = build();
    T* memory = workspace<T>(table.size());
    std::copy(table.begin(), table.end(), memory);
    return memory;
  }
  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes,
              const Arguments&... arguments) {
    ++launches;
    emulation::device().launch(kernel, blocks_x, blocks_y, threads, shared_bytes, arguments...);
  }
};

void run_update(EmulatedLauncher& launcher, const ImageView& perturbation, Precision precision,
                const Geometry& geometry, std::FILE* cases, std::FILE* results) {
  int64_t field[kUpdateFields];
  double settings[2];
  read(cases, field, sizeof(field));
  read(cases, settings, sizeof(settings));
  Estimate estimate{};
  estimate.binning = static_cast<Binning>(field[kBinning]);
  estimate.decay = settings[0];
  estimate.target_variance = settings[1];
  estimate.clip = field[kClip] != 0;
  for (int axis = 0; axis < 2; ++axis) {
    estimate.bins[axis] = static_cast<int>(field[kBins + axis]);
    estimate.table_size[axis] = static_cast<int>(field[kTableSize + axis]);
    estimate.spectrum_size[axis] = static_cast<int>(field[kSpectrumSize + axis]);
  }
  const int64_t pairs = int64_t{geometry.channels} * geometry.channels;
  const auto area = [](const int (&size)[2]) { return int64_t{size[0]} * size[1]; };
  const Buffer values(4 * pairs * area(estimate.bins));
  const Buffer mean(4 * int64_t{geometry.channels} * geometry.height * geometry.width), scale(4);
  const Buffer updates(8), skipped(8), arrivals(4 * kMaximumGroups), arranged(4 * arranged_words(geometry));
  const Buffer table(4 * pairs * area(estimate.table_size)), spectrum(4 * pairs * area(estimate.spectrum_size));
  for (const Buffer* state : {&values, &mean, &scale, &updates, &skipped, &arrivals})
    read(cases, state->data.get(), state->size);
  estimate.values = static_cast<float*>(values.data.get());
  estimate.mean = static_cast<float*>(mean.data.get());
  estimate.scale = static_cast<float*>(scale.data.get());
  estimate.table = static_cast<float*>(table.data.get());
  estimate.spectrum = static_cast<float*>(spectrum.data.get());
  estimate.updates = static_cast<int64_t*>(updates.data.get());
  estimate.skipped = static_cast<int64_t*>(skipped.data.get());
  estimate.arrivals = static_cast<unsigned*>(arrivals.data.get());
  estimate.arranged = static_cast<float*>(arranged.data.get());
  if (!compute_update(launcher, perturbation, estimate, precision, geometry)) std::exit(2);
  for (const Buffer* state : {&values, &mean, &scale, &updates, &skipped, &arrivals, &table, &spectrum, &arranged})
    std::fwrite(state->data.get(), 1, state->size, results);
}

template <class T>
void run_case(const int64_t* field, std::FILE* cases, std::FILE* results) {
  const Geometry geometry{field[kBatch],
                          static_cast<int>(field[kChannels]),
                          static_cast<int>(field[kHeight]),
                          static_cast<int>(field[kWidth]),
                          static_cast<int>(field[kRows]),
                          static_cast<int>(field[kColumns])};
  const auto element = static_cast<Element>(field[kElement]);
  const auto precision = static_cast<Precision>(field[kPrecision]);
  const int64_t bytes = element_size(element);
  const int parts = static_cast<int>(field[kParts]);
  EmulatedLauncher launcher{static_cast<int>(field[kSharedLimit]), {}};

  const auto read_images = [&] {
    const bool sparse = field[kStorage] < 0;
    Buffer storage(std::abs(field[kStorage]) * bytes, !sparse);
    if (!sparse) read(cases, storage.data.get(), storage.size);
    const int64_t *size = field + kBatch, *stride = field + kStride;
    for (int64_t i = 0; sparse && i < size[0] * size[1] * size[2] * size[3]; ++i) {
      const int64_t row = i / size[3], plane = row / size[2];
      const int64_t place = plane / size[1] * stride[0] + plane % size[1] * stride[1] + row % size[2] * stride[2] +
                            i % size[3] * stride[3];
      read(cases, static_cast<char*>(storage.data.get()) + (field[kOffset] + place) * bytes, bytes);
    }
    return storage;
  };
  const auto view_of = [&](const Buffer& storage) {
    ImageView view{static_cast<char*>(storage.data.get()) + field[kOffset] * bytes, element, {}};
    std::memcpy(view.stride, field + kStride, sizeof(view.stride));
    return view;
  };
  const Buffer a = read_images();
  if (field[kOperator] == 4) return run_update(launcher, view_of(a), precision, geometry, cases, results);
  const int64_t spectrum_size = parts * field[kChannels] * field[kChannels] * field[kRows] * field[kColumns];
  Buffer spectrum(spectrum_size * sizeof(T));

  if (field[kOperator] == 3) {
    const Buffer b = field[kHasB] ? read_images() : Buffer(0);
    const ImageView view_a = view_of(a), view_b = field[kHasB] ? view_of(b) : view_a;
    compute_cross_spectrum(launcher, view_a, view_b, !field[kHasB], parts, precision,
                           static_cast<T*>(spectrum.data.get()), geometry);
    std::fwrite(spectrum.data.get(), 1, spectrum.size, results);
    return;
  }

  read(cases, spectrum.data.get(), spectrum.size);
  SpectrumView<T> lambda{static_cast<const T*>(spectrum.data.get()), parts, spectrum_size / parts, {}};
  std::memcpy(lambda.stride, field + kSpectrumStride, sizeof(lambda.stride));
  if constexpr (std::is_same_v<T, float>) {
    if (field[kOperator] == 5) {
      const Buffer tiles(4 * arranged_words(geometry));
      compute_arranged(launcher, lambda, geometry, static_cast<float*>(tiles.data.get()));
      std::fwrite(tiles.data.get(), 1, tiles.size, results);
      return;
    }
  }
  const Buffer arranged(field[kHasB] ? 4 * arranged_words(geometry) : 0);
  read(cases, arranged.data.get(), arranged.size);
  const int64_t plane = field[kHeight] * field[kWidth];
  const Buffer product(field[kBatch] * field[kChannels] * plane * bytes);
  const Buffer quadratic(field[kBatch] * sizeof(T));
  const bool wants_product = field[kOperator] != 2, wants_quadratic = field[kOperator] != 0;
  const ImageView target{
      wants_product ? product.data.get() : nullptr, element, {field[kChannels] * plane, plane, field[kWidth], 1}};
  compute_product(launcher, view_of(a), lambda, field[kHasB] ? static_cast<const float*>(arranged.data.get()) : nullptr,
                  target, wants_quadratic ? static_cast<T*>(quadratic.data.get()) : nullptr, wants_quadratic, precision,
                  geometry);
  if (wants_quadratic) std::fwrite(quadratic.data.get(), 1, quadratic.size, results);
  if (wants_product) std::fwrite(product.data.get(), 1, product.size, results);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "lengths") {
    for (int length = 1; length <= 4096; ++length)
      if (fourier_side(length) > 0) std::printf("%d\n", length);
    return 0;
  }
  if (argc < 3) return 2;
  emulation::device().descending = argc > 3 && std::string(argv[3]) == "descending";
  std::FILE* cases = std::fopen(argv[1], "rb");
  std::FILE* results = std::fopen(argv[2], "wb");
  if (!cases || !results) return 2;
  int64_t field[kFields];
  while (std::fread(field, sizeof(int64_t), kFields, cases) == kFields) {
    launches = 0;
    if (static_cast<Element>(field[kElement]) == Element::kFloat64)
      run_case<double>(field, cases, results);
    else
      run_case<float>(field, cases, results);
    std::fwrite(&launches, sizeof(launches), 1, results);
  }
  std::fclose(cases);
  return std::fclose(results) == 0 ? 0 : 2;
}
