// cross_spectrum on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "workspace.h"

namespace sgr::cpu {
namespace {

// The blocks are summed in chunks, the chunks in order, so that the result does not depend on the number of
// threads. Images with enough row panels are shared by the threads panel by panel instead: one chunk at a
// time.
constexpr int64_t kPanelsToShare = 8;
constexpr int64_t kTile = 16;  // columns unpacked together, while their cache lines are there
constexpr int64_t kBlocksPerChunk = 8,
                  kMaxBlocksPerChunk = 512;              // at most: single-precision sums stay accurate
constexpr int64_t kChunks = 64, kChunkBytes = 16 << 20;  // at a time

template <class T>
class Accumulation {
 public:
  Accumulation(const Tensor& a, const Tensor& b, const Tensor& result, const Shape& shape)
      : kernels_(kernels<T>()),
        plan_(kernels_.plan(shape)),
        axes_(shape, kernels_.max_block()),
        a_(images_of(a)),
        b_(images_of(b)),
        same_(a_.data == b_.data && std::equal(a_.strides, a_.strides + 4, b_.strides)),
        operands_(same_ ? 1 : 2),
        threads_(useful_threads(static_cast<double>(operands_) * transform_operations(shape))),
        split_blocks_(plan_.row_panels >= kPanelsToShare),
        chunk_blocks_(blocks_per_chunk()),
        chunks_(chunks_at_a_time()),
        workspaces_(split_blocks_ ? 1 : std::min(threads_, chunks_)),
        workspace_(result, workspaces_ * operands_ * plan_.workspace_size),
        scratch_(result, threads_ * plan_.scratch_size),
        sums_(result, chunks_ * plan_.sums_size),
        total_(result, plan_.blocks > chunk_blocks_ ? plan_.sums_size : 0) {}

  void run(T* result) {
    if (plan_.blocks <= chunk_blocks_) {
      add_chunk(0, 0, 0, split_blocks_ ? threads_ : 1);
      unpack(sums_.data(), result);
      return;
    }
    std::fill(total_.data(), total_.data() + plan_.sums_size, 0.0);
    for (int64_t first = 0; first < plan_.blocks; first += chunks_ * chunk_blocks_) {
      const int64_t blocks = std::min(plan_.blocks - first, chunks_ * chunk_blocks_);
      const int64_t chunks = (blocks + chunk_blocks_ - 1) / chunk_blocks_;
      if (split_blocks_) {
        add_chunk(first, 0, 0, threads_);
      } else {
        share(chunks, workspaces_, [&](int64_t slot, int64_t begin, int64_t end) {
          for (int64_t chunk = begin; chunk < end; ++chunk) add_chunk(first, chunk, slot, 1);
        });
      }
      add_to_total(chunks);
    }
    unpack(total_.data(), result);
  }

 private:
  int64_t blocks_per_chunk() const {
    const int64_t equal = split_blocks_ ? plan_.blocks : (plan_.blocks + kChunks - 1) / kChunks;
    return std::min(kMaxBlocksPerChunk, std::max(kBlocksPerChunk, equal));
  }

  int64_t chunks_at_a_time() const {
    if (split_blocks_) return 1;
    const int64_t fitting = kChunkBytes / (plan_.sums_size * static_cast<int64_t>(sizeof(T)));
    const int64_t needed = (plan_.blocks + chunk_blocks_ - 1) / chunk_blocks_;
    return std::max<int64_t>(1, std::min({fitting, kChunks, needed}));
  }

  // The sums of one chunk by `threads` threads, with the workspaces of `slot` and scratch from `slot` on.
  void add_chunk(int64_t first, int64_t chunk, int64_t slot, int64_t threads) {
    T* sums = sums_.data() + chunk * plan_.sums_size;
    std::fill(sums, sums + plan_.sums_size, T(0));
    const int64_t begin = first + chunk * chunk_blocks_, end = std::min(plan_.blocks, begin + chunk_blocks_);
    for (int64_t block = begin; block < end; ++block) {
      const T* a = transform_columns(a_, block, slot * operands_, slot, threads);
      const T* b = same_ ? a : transform_columns(b_, block, slot * operands_ + 1, slot, threads);
      share(plan_.row_panels, threads, [&](int64_t part, int64_t begin, int64_t end) {
        T* scratch = scratch_.data() + (slot + part) * plan_.scratch_size;
        kernels_.rows_accumulate(plan_, axes_.horizontal(), a, b, sums, scratch, begin, end);
      });
    }
  }

  const T* transform_columns(const Images& images, int64_t block, int64_t index, int64_t slot, int64_t threads) {
    T* workspace = workspace_.data() + index * plan_.workspace_size;
    share(plan_.shape.height, threads,
          [&](int64_t, int64_t begin, int64_t end) { kernels_.load(plan_, images, block, workspace, begin, end); });
    share(plan_.column_panels, threads, [&](int64_t part, int64_t begin, int64_t end) {
      T* scratch = scratch_.data() + (slot + part) * plan_.scratch_size;
      kernels_.columns_forward(plan_, axes_.vertical(), workspace, scratch, begin, end);
    });
    return workspace;
  }

  void add_to_total(int64_t chunks) {
    share(plan_.sums_size, threads_, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const T* sums = sums_.data() + chunk * plan_.sums_size;
        for (int64_t i = begin; i < end; ++i) total_.data()[i] += static_cast<double>(sums[i]);
      }
    });
  }

  // result[part][c][c'][k][l] = sum over packed images of sums[panel][l][part][c][c'][lane].
  template <class Sum>
  void unpack(const Sum* sums, T* result) const {
    const int64_t entries = plan_.shape.parts * plan_.shape.channels * plan_.shape.channels;
    std::fill(result, result + entries * plan_.shape.rows * plan_.shape.columns, T(0));
    share((plan_.shape.columns + kTile - 1) / kTile, threads_, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = 0; row < plan_.packed * plan_.shape.rows; row += plan_.lanes) {
        for (int64_t tile = begin; tile < end; ++tile) {
          for (int64_t entry = 0; entry < entries; ++entry) unpack_tile(sums, row, tile * kTile, entry, result);
        }
      }
    });
  }

  // One entry of the panel that begins at `row`, for kTile columns from `column` on.
  template <class Sum>
  void unpack_tile(const Sum* sums, int64_t row, int64_t column, int64_t entry, T* result) const {
    const Shape& shape = plan_.shape;
    const int64_t channels = shape.channels, matrix = channels * channels;
    const int64_t part = entry / matrix, c = entry / channels % channels, d = entry % channels;
    // With one operand only c <= c' was summed: the rest is its transpose.
    const bool mirrored = same_ && d < c;
    const int64_t source = mirrored ? (part * channels + d) * channels + c : entry;
    const Sum sign = mirrored && (part == 1 || part == 2) ? Sum(-1) : Sum(1);
    const int64_t stride = shape.parts * matrix * plan_.lanes;
    const Sum* from = sums + (row / plan_.lanes * shape.columns + column) * stride + source * plan_.lanes;
    const int64_t width = std::min(kTile, shape.columns - column);
    const int64_t lanes = std::min(plan_.lanes, plan_.packed * shape.rows - row);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      T* to = result + (entry * shape.rows + (row + lane) % shape.rows) * shape.columns + column;
      for (int64_t l = 0; l < width; ++l) to[l] += static_cast<T>(sign * from[l * stride + lane]);
    }
  }

  const Kernels<T>& kernels_;
  const Plan plan_;
  const Axes<T> axes_;
  const Images a_, b_;
  const bool same_;
  const int64_t operands_, threads_;
  const bool split_blocks_;
  const int64_t chunk_blocks_, chunks_, workspaces_;
  Buffer<T> workspace_, scratch_, sums_;
  Buffer<double> total_;
};

}  // namespace

Tensor cross_spectrum(const Tensor& a, const Tensor& b, int64_t rows, int64_t columns, bool is_signed,
                      const std::string&) {
  const Shape shape = check_cross_spectrum(a, b, rows, columns, is_signed);
  std::vector<int64_t> size{shape.channels, shape.channels, rows, columns};
  if (is_signed) size.insert(size.begin(), shape.parts);
  Tensor result = allocate(a, size, compute_dtype(a));
  if (shape.batch == 0) return torch::stable::zero_(result);
  if (compute_dtype(a) == ScalarType::Double) {
    Accumulation<double>(a, b, result, shape).run(static_cast<double*>(result.mutable_data_ptr()));
  } else {
    Accumulation<float>(a, b, result, shape).run(static_cast<float*>(result.mutable_data_ptr()));
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(sgr_kernels, CPU, m) { m.impl("native_cross_spectrum", TORCH_BOX(&cross_spectrum)); }

}  // namespace sgr::cpu
