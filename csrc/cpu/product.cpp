// product and quadratic_form on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <string>
#include <tuple>

#include "workspace.h"

namespace sgr::cpu {
namespace {

constexpr int64_t kLarge = 128 * 128;  // pixels

// v = Sigma g into `product` and g . v into `form`, either of which may be absent.
template <class T>
class Multiplication {
 public:
  Multiplication(const Tensor& gradient, const Tensor& spectrum, const Shape& shape, bool symmetric, Tensor* product,
                 T* form)
      : kernels_(kernels<T>()),
        plan_(kernels_.plan(shape)),
        axes_(shape, kernels_.max_block()),
        gradient_(images_of(gradient)),
        product_(product ? images_of(*product) : Images{}),
        inverse_(product != nullptr),
        form_(form),
        threads_(useful_threads((inverse_ ? 2 : 1) * transform_operations(shape))),
        // Whole blocks per thread, unless there are too few of them to go round, or the threads' workspaces for large
        // images would need more memory than the batch.
        split_blocks_(plan_.blocks < threads_ || (plan_.blocks < 4 * threads_ && plan_.blocks % threads_ != 0) ||
                      (shape.height * shape.width > kLarge &&
                       threads_ * plan_.workspace_size > shape.batch * shape.channels * shape.height * shape.width)),
        workspaces_(split_blocks_ ? 1 : threads_),
        workspace_(spectrum, workspaces_ * plan_.workspace_size),
        scratch_(spectrum, threads_ * plan_.scratch_size),
        forms_(spectrum, workspaces_ * plan_.row_panels * plan_.packed),
        spectrum_(spectrum, plan_.spectrum_size) {
    const Tensor dense = make_contiguous(spectrum);
    const T* values = static_cast<const T*>(dense.const_data_ptr());
    share(plan_.row_panels, threads_, [&](int64_t, int64_t begin, int64_t end) {
      kernels_.pack_spectrum(plan_, values, symmetric, spectrum_.data(), begin, end);
    });
  }

  void run() {
    if (split_blocks_) {
      for (int64_t block = 0; block < plan_.blocks; ++block) run_block(block, 0, threads_);
    } else {
      share(plan_.blocks, threads_, [&](int64_t slot, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) run_block(block, slot, 1);
      });
    }
  }

 private:
  // One block by `threads` threads, with workspace `slot` and scratch from `slot` on.
  void run_block(int64_t block, int64_t slot, int64_t threads) {
    T* workspace = workspace_.data() + slot * plan_.workspace_size;
    double* forms = form_ ? forms_.data() + slot * plan_.row_panels * plan_.packed : nullptr;
    const auto scratch = [&](int64_t part) { return scratch_.data() + (slot + part) * plan_.scratch_size; };
    share(plan_.shape.height, threads,
          [&](int64_t, int64_t begin, int64_t end) { kernels_.load(plan_, gradient_, block, workspace, begin, end); });
    share(plan_.column_panels, threads, [&](int64_t part, int64_t begin, int64_t end) {
      kernels_.columns_forward(plan_, axes_.vertical(), workspace, scratch(part), begin, end);
    });
    share(plan_.row_panels, threads, [&](int64_t part, int64_t begin, int64_t end) {
      kernels_.rows_multiply(plan_, axes_.horizontal(), spectrum_.data(), workspace, inverse_, forms, scratch(part),
                             begin, end);
    });
    if (form_) add_forms(block, forms);
    if (!inverse_) return;
    share(plan_.column_panels, threads, [&](int64_t part, int64_t begin, int64_t end) {
      kernels_.columns_inverse(plan_, axes_.vertical(), workspace, scratch(part), begin, end);
    });
    share(plan_.shape.height, threads,
          [&](int64_t, int64_t begin, int64_t end) { kernels_.store(plan_, product_, block, workspace, begin, end); });
  }

  void add_forms(int64_t block, const double* forms) {
    for (int64_t p = 0; p < plan_.packed; ++p) {
      const int64_t b = block * plan_.packed + p;
      if (b >= plan_.shape.batch) break;
      double sum = 0.0;
      for (int64_t panel = 0; panel < plan_.row_panels; ++panel) sum += forms[panel * plan_.packed + p];
      form_[b] = static_cast<T>(sum);
    }
  }

  const Kernels<T>& kernels_;
  const Plan plan_;
  const Axes<T> axes_;
  const Images gradient_, product_;
  const bool inverse_;
  T* const form_;
  const int64_t threads_;
  const bool split_blocks_;
  const int64_t workspaces_;
  Buffer<T> workspace_, scratch_;
  Buffer<double> forms_;
  Buffer<T> spectrum_;
};

template <class T>
void multiply(const Tensor& gradient, const Tensor& spectrum, const Shape& shape, bool symmetric, Tensor* product,
              Tensor* form) {
  if (shape.batch == 0) return;
  T* q = form ? static_cast<T*>(form->mutable_data_ptr()) : nullptr;
  Multiplication<T>(gradient, spectrum, shape, symmetric, product, q).run();
}

void multiply(const Tensor& gradient, const Tensor& spectrum, const Shape& shape, bool symmetric, Tensor* product,
              Tensor* form) {
  if (spectrum.scalar_type() == ScalarType::Double) {
    multiply<double>(gradient, spectrum, shape, symmetric, product, form);
  } else {
    multiply<float>(gradient, spectrum, shape, symmetric, product, form);
  }
}

}  // namespace

Tensor product(const Tensor& gradient, const Tensor& spectrum, const std::string&) {
  const Shape shape = check_product(gradient, spectrum);
  Tensor result = allocate(gradient, gradient.sizes());
  multiply(gradient, spectrum, shape, false, &result, nullptr);
  return result;
}

std::tuple<Tensor, Tensor> quadratic_form(const Tensor& gradient, const Tensor& spectrum, bool with_product,
                                          const std::string&) {
  const Shape shape = check_product(gradient, spectrum);
  Tensor form = allocate(spectrum, {shape.batch});
  Tensor result = with_product ? allocate(gradient, gradient.sizes()) : allocate(gradient, {0});
  multiply(gradient, spectrum, shape, true, with_product ? &result : nullptr, &form);
  return {form, result};
}

STABLE_TORCH_LIBRARY_IMPL(sgr_kernels, CPU, m) {
  m.impl("native_product", TORCH_BOX(&product));
  m.impl("native_quadratic_form", TORCH_BOX(&quadratic_form));
}

}  // namespace sgr::cpu
