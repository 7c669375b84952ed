// Launches on the current stream of a tensor's device, for the schedule.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../allocate.h"
#include "../checks.h"
#include "schedule.cuh"

// libtorch_cuda has this symbol. Weak, so that a binary with CUDA kernels also loads beside a torch without CUDA.
#pragma weak aoti_torch_get_current_cuda_stream

namespace sgr::cuda {

// An error that is told is forgotten: what comes next is not to find it.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(status));
}

template <class Kernel>
void check_launch(cudaError_t status, Kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads,
                  int shared_bytes) {
  if (status == cudaSuccess) return;
  const char* name = nullptr;
  if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) != cudaSuccess) name = "of an unknown name";
  cudaGetLastError();
  STD_TORCH_CHECK(false, "launch of kernel ", name, " on ", blocks_x, " x ", blocks_y, " blocks of ", threads,
                  " threads with ", shared_bytes, " bytes of shared memory: CUDA error: ", cudaGetErrorString(status));
}

// Makes the tensor's device current for its own life; its workspaces return to the allocator at the end, which
// keeps the order of the stream.
class CudaLauncher {
 public:
  explicit CudaLauncher(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    const int device = like.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, reinterpret_cast<void**>(&stream_)));
    check_cuda(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
  }

  int shared_limit = 0, multiprocessors = 0;

  template <class Kernel>
  int64_t resident_blocks(Kernel kernel, int threads, int shared_bytes) const {
    check_cuda(allow_shared(kernel, shared_bytes), "shared memory");
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "occupancy");
    return static_cast<int64_t>(std::max(blocks, 1)) * multiprocessors;
  }

  template <class T>
  T* workspace(int64_t count) {
    const std::vector<int64_t> size{count * static_cast<int64_t>(sizeof(T))};
    workspaces_.push_back(allocate(like_, size, ScalarType::Byte));
    return static_cast<T*>(workspaces_.back().mutable_data_ptr());
  }

  // Uploaded once for each device and kept for good, so that recorded graphs find it too.
  template <class T, class Build>
  const T* constants(const std::array<int64_t, 3>& key, Build build) {
    static std::mutex mutex;
    static std::map<std::pair<int, std::array<int64_t, 3>>, void*> tables;  // of this kind
    const std::lock_guard lock(mutex);
    void*& table = tables[{like_.get_device_index(), key}];
    if (table == nullptr) {
      const std::vector<T> values = build();
      table = upload(values.data(), values.size() * sizeof(T));
    }
    return static_cast<const T*>(table);
  }

  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes,
              const Arguments&... arguments) const {
    STD_TORCH_CHECK(blocks_x <= std::numeric_limits<int>::max(), "images: too many for one launch: ", blocks_x,
                    " thread blocks");
    cudaError_t status = allow_shared(kernel, shared_bytes);
    if (status == cudaSuccess) {
      const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
      kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
      status = cudaGetLastError();
    }
    check_launch(status, kernel, blocks_x, blocks_y, threads, shared_bytes);
  }

 private:
  // More than 48 KiB of shared memory a kernel gets only when asked for.
  template <class Kernel>
  static cudaError_t allow_shared(Kernel kernel, int shared_bytes) {
    if (shared_bytes <= 48 << 10) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }

  // Beside the current stream: in the middle of its capture, allocating and waiting are no business of the graph.
  static void* upload(const void* source, size_t bytes) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "constants");
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t status = cudaMalloc(&memory, bytes);
    if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = cudaMemcpyAsync(memory, source, bytes, cudaMemcpyHostToDevice, stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check_cuda(status, "constants");
    return memory;
  }

  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> workspaces_;
};

inline Element element_of(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::Double: return Element::kFloat64;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: return Element::kFloat32;
  }
}

inline ImageView view_of(const Tensor& images) {
  return {images.mutable_data_ptr(),
          element_of(images),
          {images.stride(0), images.stride(1), images.stride(2), images.stride(3)}};
}

template <class T>
SpectrumView<T> spectrum_view(const Tensor& spectrum) {
  const int64_t leading = spectrum.dim() - 4;
  SpectrumView<T> view{
      static_cast<const T*>(spectrum.const_data_ptr()), leading ? 4 : 1, leading ? spectrum.stride(0) : 0, {}};
  for (int i = 0; i < 4; ++i) view.stride[i] = spectrum.stride(leading + i);
  return view;
}

inline Geometry geometry_of(const Shape& shape) {
  const auto narrow_size = [](int64_t size, const char* name) {
    STD_TORCH_CHECK(size <= std::numeric_limits<int>::max() / 16, name, ": expected fewer than 2^27, got ", size);
    return static_cast<int>(size);
  };
  return {shape.batch,
          narrow_size(shape.channels, "channels"),
          narrow_size(shape.height, "height"),
          narrow_size(shape.width, "width"),
          narrow_size(shape.rows, "row frequencies"),
          narrow_size(shape.columns, "column frequencies")};
}

// Memory for an arranged spectrum, beside the natural one.
inline float* arranged_of(const Tensor& arranged, const Tensor& spectrum, const Geometry& geometry) {
  const int64_t words = arranged_words(geometry);
  STD_TORCH_CHECK(words > 0 && arranged.dim() == 1 && arranged.size(0) == words && arranged.stride(0) == 1 &&
                      arranged.scalar_type() == ScalarType::Float && arranged.device() == spectrum.device(),
                  "arranged: expected ", words, " dense float32 numbers on the spectrum's device, got shape ",
                  shape_of(arranged));
  return static_cast<float*>(arranged.mutable_data_ptr());
}

inline Precision parse_precision(const std::string& precision) {
  if (precision == "highest") return Precision::kHighest;
  if (precision == "high") return Precision::kHigh;
  STD_TORCH_CHECK(precision == "medium", "precision: expected 'highest', 'high' or 'medium', got '", precision, "'");
  return Precision::kMedium;
}

}  // namespace sgr::cuda
