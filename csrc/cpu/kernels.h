// The interface between the operators (compiled once) and the kernels (compiled once per instruction set).
#pragma once

#include <cstdint>

#include "axis.h"

namespace sgr::cpu {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

// A (batch, channels, height, width) tensor; strides in elements.
struct Images {
  void* data;
  Dtype dtype;
  int64_t strides[4];
};

// How a call is cut up. Several small images are packed side by side into one block so that vectors are full.
// A workspace holds one block: row y (pixels) or k (frequencies; cosines, then sines) of every channel of
// every packed image, `stride` elements apart; the columns (c, p, x) of a row are contiguous. It serves as
// input and output of both directions in turn: a column of 2 rows frequencies overwrites its own height
// pixels.
struct Plan {
  Shape shape;
  int64_t lanes;          // elements per vector
  int64_t packed;         // images per block
  int64_t blocks;         // of images
  int64_t vectors;        // per row of the workspace
  int64_t stride;         // of the workspace
  int64_t column_panels;  // two vectors of columns each (the last may have one)
  int64_t row_panels;     // one vector of row frequencies (p, k) each, cosines and sines
  int64_t workspace_size, scratch_size, spectrum_size, sums_size;  // elements
};

// Everything works on a range of rows or panels of one block, so that callers choose how to share the work.
template <class T>
class Kernels {
 public:
  virtual const char* instruction_set() const = 0;
  virtual int max_block() const = 0;
  virtual Plan plan(const Shape& shape) const = 0;

  // Spectrum in the order in which rows_multiply reads it; symmetric: that of (Sigma + Sigma^T) / 2.
  virtual void pack_spectrum(const Plan& plan, const T* spectrum, bool symmetric, T* packed, int64_t begin,
                             int64_t end) const = 0;

  // Images of a block to workspace rows [begin, end) and back; images beyond the batch are zero.
  virtual void load(const Plan& plan, const Images& images, int64_t block, T* workspace, int64_t begin,
                    int64_t end) const = 0;
  virtual void store(const Plan& plan, const Images& images, int64_t block, const T* workspace, int64_t begin,
                     int64_t end) const = 0;

  // Column transforms of column panels [begin, end), in place.
  virtual void columns_forward(const Plan& plan, const Axis<T>& axis, T* workspace, T* scratch, int64_t begin,
                               int64_t end) const = 0;
  virtual void columns_inverse(const Plan& plan, const Axis<T>& axis, T* workspace, T* scratch, int64_t begin,
                               int64_t end) const = 0;

  // For row panels [begin, end): row transform, product with the spectrum, and back, in place (unless
  // !inverse). forms[panel * packed + p], if not null: the panel's part of image p's quadratic form.
  virtual void rows_multiply(const Plan& plan, const Axis<T>& axis, const T* packed_spectrum, T* workspace,
                             bool inverse, double* forms, T* scratch, int64_t begin, int64_t end) const = 0;

  // For row panels [begin, end): row transform, then sums[panel][l][part][c][c'][lane] += Z^a_c Z^b_c' over
  // the parities. With a == b only c <= c' is written.
  virtual void rows_accumulate(const Plan& plan, const Axis<T>& axis, const T* a, const T* b, T* sums, T* scratch,
                               int64_t begin, int64_t end) const = 0;

 protected:
  ~Kernels() = default;
};

// Names of the instruction sets that this binary contains and this processor has, best first.
int instruction_sets(const char* names[], int capacity);

// Restricts the kernels to one of them; false if it is not available. For tests.
bool select_instruction_set(const char* name);

// The kernels in use.
template <class T>
const Kernels<T>& kernels();

}  // namespace sgr::cpu
