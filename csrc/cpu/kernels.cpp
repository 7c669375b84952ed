// The CPU kernels for one instruction set. Compiled once per instruction set, with SGR_ISA (its name) and
// SGR_VECTOR_BYTES defined.
#include "kernels.h"

#include "convert.h"
#include "rows.h"
#include "transform.h"

#define SGR_STRINGIZE_(x) #x
#define SGR_STRINGIZE(x) SGR_STRINGIZE_(x)

namespace sgr::cpu {
namespace SGR_ISA {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // images are packed into one block while it stays far below the L2 size

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

template <class T>
class KernelsFor final : public Kernels<T> {
 public:
  static constexpr int lanes = Simd<T>::lanes;

  const char* instruction_set() const override { return SGR_STRINGIZE(SGR_ISA); }
  int max_block() const override { return kMaxBlock; }

  Plan plan(const Shape& shape) const override {
    Plan plan;
    plan.shape = shape;
    plan.lanes = lanes;
    plan.packed = packed_images(shape);
    plan.blocks = divide_up(shape.batch, plan.packed);
    plan.vectors = divide_up(plan.packed * shape.channels * shape.width, lanes);
    // An odd number of cache lines: the rows of a column do not compete for the same cache sets.
    plan.stride = (plan.vectors | 1) * lanes;
    plan.column_panels = divide_up(plan.vectors, 2);
    plan.row_panels = divide_up(plan.packed * shape.rows, lanes);
    plan.workspace_size = (2 * shape.rows * plan.stride) + lanes;
    const int64_t transform_rows =
        larger(Axis<T>::scratch_rows(shape.height, shape.rows), Axis<T>::scratch_rows(shape.width, shape.columns));
    plan.scratch_size = lanes * (kKinds * transform_rows +                          // of one transform
                                 kKinds * divide_up(shape.width, lanes) * lanes +   // pixels
                                 2 * shape.channels * 2 * shape.columns * kKinds +  // transformed a, b
                                 4 * shape.channels);                               // mixed
    plan.spectrum_size = plan.row_panels * shape.columns * shape.parts * shape.channels * shape.channels * lanes;
    plan.sums_size = plan.spectrum_size;
    return plan;
  }

  void pack_spectrum(const Plan& plan, const T* spectrum, bool symmetric, T* packed, int64_t begin,
                     int64_t end) const override {
    const int64_t channels = plan.shape.channels, columns = plan.shape.columns;
    const int64_t plane = plan.shape.rows * columns, entries = plan.shape.parts * channels * channels;
    for (int64_t index = begin; index < end; ++index) {
      const Panel<T> panel(plan, index);
      for (int64_t entry = 0; entry < entries; ++entry) {
        const int64_t part = entry / (channels * channels), c = entry / channels % channels, d = entry % channels;
        const T* left = spectrum + entry * plane;
        // The transposed matrix: channels change places, and parts odd in one axis their sign.
        const T* right = spectrum + ((part * channels + d) * channels + c) * plane;
        const T sign = part == 1 || part == 2 ? T(-0.5) : T(0.5);
        T* out = packed + (index * columns * entries + entry) * lanes;
        for (int j = 0; j < lanes; ++j) {
          const int64_t row = panel.frequency[j] * columns;
          for (int64_t l = 0; l < columns; ++l) {
            out[l * entries * lanes + j] = symmetric ? T(0.5) * left[row + l] + sign * right[row + l] : left[row + l];
          }
        }
      }
    }
  }

  void load(const Plan& plan, const Images& images, int64_t block, T* workspace, int64_t begin,
            int64_t end) const override {
    const Shape& shape = plan.shape;
    with_elements<T>(images, [&](const auto* data) {
      for (int64_t y = begin; y < end; ++y) {
        T* row = workspace + y * plan.stride;
        for (int64_t c = 0; c < shape.channels; ++c) {
          for (int64_t p = 0; p < plan.packed; ++p, row += shape.width) {
            const int64_t b = block * plan.packed + p;
            if (b < shape.batch) {
              const auto* from = data + b * images.strides[0] + c * images.strides[1] + y * images.strides[2];
              convert_row(from, images.strides[3], row, 1, shape.width);
            } else {
              for (int64_t x = 0; x < shape.width; ++x) row[x] = T(0);
            }
          }
        }
      }
    });
  }

  void store(const Plan& plan, const Images& images, int64_t block, const T* workspace, int64_t begin,
             int64_t end) const override {
    const Shape& shape = plan.shape;
    with_elements<T>(images, [&](auto* data) {
      for (int64_t y = begin; y < end; ++y) {
        for (int64_t c = 0; c < shape.channels; ++c) {
          for (int64_t p = 0; p < plan.packed; ++p) {
            const int64_t b = block * plan.packed + p;
            if (b >= shape.batch) break;
            auto* to = data + b * images.strides[0] + c * images.strides[1] + y * images.strides[2];
            const T* row = workspace + y * plan.stride + (c * plan.packed + p) * shape.width;
            convert_row(row, 1, to, images.strides[3], shape.width);
          }
        }
      }
    });
  }

  void columns_forward(const Plan& plan, const Axis<T>& axis, T* workspace, T* scratch, int64_t begin,
                       int64_t end) const override {
    auto* transform = reinterpret_cast<Vec<T>*>(scratch);
    for (int64_t panel = begin; panel < end; ++panel) {
      T* columns = workspace + panel * 2 * lanes;
      if (panel * 2 + 1 < plan.vectors) {
        transform_forward<T, 2>(axis, columns, plan.stride, transform, columns, plan.stride);
      } else {
        transform_forward<T, 1>(axis, columns, plan.stride, transform, columns, plan.stride);
      }
    }
  }

  void columns_inverse(const Plan& plan, const Axis<T>& axis, T* workspace, T* scratch, int64_t begin,
                       int64_t end) const override {
    auto* transform = reinterpret_cast<Vec<T>*>(scratch);
    for (int64_t panel = begin; panel < end; ++panel) {
      T* columns = workspace + panel * 2 * lanes;
      if (panel * 2 + 1 < plan.vectors) {
        transform_inverse<T, 2>(axis, columns, plan.stride, transform, columns, plan.stride);
      } else {
        transform_inverse<T, 1>(axis, columns, plan.stride, transform, columns, plan.stride);
      }
    }
  }

  void rows_multiply(const Plan& plan, const Axis<T>& axis, const T* packed_spectrum, T* workspace, bool inverse,
                     double* forms, T* scratch, int64_t begin, int64_t end) const override {
    const Rows rows(plan, axis, scratch);
    for (int64_t index = begin; index < end; ++index) {
      const Panel<T> panel(plan, index);
      rows.forward(panel, workspace, rows.transformed);
      const T* spectrum = packed_spectrum + index * plan.spectrum_size / plan.row_panels;
      double form[lanes];
      multiply<T>(plan, spectrum, rows.transformed, rows.mixed, form);
      if (forms != nullptr) {
        panel.sum_by_image(form, forms + index * plan.packed);
      }
      if (inverse) rows.inverse(panel, workspace);
    }
  }

  void rows_accumulate(const Plan& plan, const Axis<T>& axis, const T* a, const T* b, T* sums, T* scratch,
                       int64_t begin, int64_t end) const override {
    const Rows rows(plan, axis, scratch);
    for (int64_t index = begin; index < end; ++index) {
      const Panel<T> panel(plan, index);
      rows.forward(panel, a, rows.transformed);
      if (a != b) rows.forward(panel, b, rows.second);
      const Vec<T>* other = a == b ? rows.transformed : rows.second;
      T* sum = sums + index * plan.sums_size / plan.row_panels;
      accumulate_products<T>(plan, rows.transformed, other, sum);
    }
  }

 private:
  // Scratch of the row panels, and the two directions on it.
  struct Rows {
    Rows(const Plan& plan, const Axis<T>& axis, T* scratch) : plan(plan), axis(axis) {
      plane = 2 * plan.shape.columns * kKinds;
      transformed = reinterpret_cast<Vec<T>*>(scratch);
      second = transformed + plan.shape.channels * plane;
      mixed = second + plan.shape.channels * plane;
      pixels = mixed + 4 * plan.shape.channels;
      transform = pixels + divide_up(plan.shape.width, lanes) * lanes * kKinds;
    }

    void forward(const Panel<T>& panel, const T* workspace, Vec<T>* out) const {
      constexpr int64_t stride = kKinds * lanes;
      for (int64_t c = 0; c < plan.shape.channels; ++c) {
        load_pixels<T>(panel, c, workspace, pixels);
        transform_forward<T, kKinds>(axis, reinterpret_cast<const T*>(pixels), stride, transform,
                                     reinterpret_cast<T*>(out + c * plane), stride);
      }
    }

    void inverse(const Panel<T>& panel, T* workspace) const {
      constexpr int64_t stride = kKinds * lanes;
      for (int64_t c = 0; c < plan.shape.channels; ++c) {
        transform_inverse<T, kKinds>(axis, reinterpret_cast<const T*>(transformed + c * plane), stride, transform,
                                     reinterpret_cast<T*>(pixels), stride);
        store_pixels<T>(panel, c, pixels, workspace);
      }
    }

    const Plan& plan;
    const Axis<T>& axis;
    int64_t plane;
    Vec<T>*transformed, *second, *mixed, *pixels, *transform;
  };

  // The number of images per block that leaves the fewest lanes empty, while image and spectrum stay in cache.
  static int64_t packed_images(const Shape& shape) {
    const int64_t image = 2 * shape.rows * shape.channels * shape.width;
    const int64_t spectrum = shape.parts * shape.channels * shape.channels * shape.rows * shape.columns;
    const int64_t bytes = larger(image, spectrum) * static_cast<int64_t>(sizeof(T));
    int64_t best = 1, best_cost = 0;
    for (int64_t packed = 1; packed <= lanes; ++packed) {
      if (packed > 1 && (packed > shape.batch || packed * bytes > kBlockBytes)) break;
      const int64_t columns = divide_up(packed * shape.channels * shape.width, lanes) * shape.height * shape.rows;
      const int64_t rows =
          divide_up(packed * shape.rows, lanes) * kKinds * shape.channels * shape.width * shape.columns;
      const int64_t cost = divide_up(shape.batch, packed) * (columns + rows);
      if (packed == 1 || cost < best_cost) {
        best = packed;
        best_cost = cost;
      }
    }
    return best;
  }
};

template <class T>
const Kernels<T>& kernels() {
  static const KernelsFor<T> instance;
  return instance;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace SGR_ISA
}  // namespace sgr::cpu
