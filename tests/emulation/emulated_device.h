// A CUDA device as far as the kernels in csrc/cuda need one, on the CPU:
// device.cuh includes this file where the compiler is not nvcc. A block's
// threads are fibers of one OS thread; one runs until it reaches a barrier or a
// warp collective. Blocks run one after the other. Shared memory starts as NaN
// and has its exact size, so that AddressSanitizer and poisoned results tell
// what a kernel reads or leaves unwritten.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define SGR_NOINLINE
#define SGR_SHARED_MEMORY(name) unsigned char* name = ::emulation::shared_memory()

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s (block %u,%u thread %u)\n", message, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

// The barrier or wait that this run leaves out, "file:line" in the environment's SGR_OMIT: what it orders must then go
// wrong.
inline bool omitted(const char* file, int line) {
  static const char* const place = std::getenv("SGR_OMIT");
  if (!place) return false;
  const char* name = std::strrchr(file, '/');
  return std::string(name ? name + 1 : file) + ":" + std::to_string(line) == place;
}

// What is no part of a kernel: the sanitizers need not watch it.
#define SGR_UNWATCHED __attribute__((optimize("O2"), no_sanitize("address", "undefined")))

// A place on some stack, to go on at. (At each swapcontext the system is asked for the mask of signals, and
// AddressSanitizer clears what it knows of the whole stack.)
using Place = void* [5];
#define SGR_SWITCH __attribute__((noinline, no_sanitize("address", "thread"))) inline
[[noreturn]] SGR_SWITCH void leap(Place& to) { __builtin_longjmp(to, 1); }
SGR_SWITCH void change(Place& from, Place& to) {
  if (!__builtin_setjmp(from)) leap(to);
}
SGR_SWITCH void begin(Place& from, const ucontext_t& context) {
  if (!__builtin_setjmp(from)) setcontext(&context);
}

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  bool begun = false, runnable = false, finished = true;
};

// What the lanes of a warp have brought to the collective they are waiting in.
struct Rendezvous {
  const char* name = nullptr;
  int arrived = 0;
  uint32_t value[kWarp][10];
  uint32_t result[kWarp][4];
};

class Device {
 public:
  bool descending = false;  // the order in which threads and blocks run: results must not depend on it

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes,
              const Arguments&... arguments) {
    entry_ = [=] { kernel(arguments...); };
    gridDim = {static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y), 1};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    const unsigned blocks = gridDim.x * gridDim.y;
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned block = descending ? blocks - 1 - i : i;
      blockIdx = {block % gridDim.x, block / gridDim.x, 0};
      run_block(threads, shared_bytes);
    }
  }

  unsigned char* shared() { return shared_.get(); }

  void barrier() {
    if (++waiting_ < fibers_.size()) return suspend();
    waiting_ = 0;
    for (auto& fiber : fibers_) fiber->runnable = true;
  }

  // Lets the others run.
  void yield() {
    if (++idle_ > 1000000) fail("waiting for what nobody sends");
    yielded_ = true;
    suspend(false, true);
  }

  // A copy under way, until somebody waits for it; meanwhile its target holds nothing of use.
  struct Copy {
    const void* barrier;
    uint32_t* target;
    const uint32_t* source;
    int words;
  };
  void send(const Copy& copy) {
    if (reinterpret_cast<uintptr_t>(copy.target) % 16 || reinterpret_cast<uintptr_t>(copy.source) % 16)
      fail("a copy of misaligned runs");
    for (int i = 0; i < copy.words; ++i) copy.target[i] = 0xffffffffu;
    copies_.push_back(copy);
  }
  void complete(const void* barrier) {
    for (const Copy& copy : copies_)
      if (copy.barrier == barrier)
        for (int i = 0; i < copy.words; ++i) static_cast<volatile uint32_t*>(copy.target)[i] = copy.source[i];
    copies_.erase(std::remove_if(copies_.begin(), copies_.end(), [=](auto& copy) { return copy.barrier == barrier; }),
                  copies_.end());
    idle_ = 0;
  }

  // Lanes deposit `count` words; the last to come computes all results, then
  // everyone goes on.
  template <class Compute>
  void collective(const char* name, uint32_t* words, int count, int results, Compute compute) {
    Rendezvous& meeting = warps_[current_ / kWarp];
    const int lane = current_ % kWarp;
    if (meeting.arrived > 0 && meeting.name != name && std::strcmp(meeting.name, name) != 0)
      fail("lanes of a warp in different collectives");
    meeting.name = name;
    std::memcpy(meeting.value[lane], words, sizeof(uint32_t) * count);
    if (++meeting.arrived == kWarp) {
      compute(meeting.value, meeting.result);
      meeting.arrived = 0;
      for (int i = 0; i < kWarp; ++i) fibers_[current_ / kWarp * kWarp + i]->runnable = true;
    } else {
      suspend();
    }
    std::memcpy(words, meeting.result[lane], sizeof(uint32_t) * results);
  }

 private:
  void run_block(int threads, int shared_bytes) {
    if (threads % kWarp != 0) fail("a block of incomplete warps");
    shared_.reset(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)));
    std::memset(shared_.get(), 0xff, shared_bytes);
    fibers_.resize(threads);
    warps_.assign(threads / kWarp, Rendezvous{});
    waiting_ = 0;
    for (auto& fiber : fibers_) {
      if (!fiber) fiber = std::make_unique<Fiber>();
      fiber->runnable = true;
      fiber->finished = false;
    }
    // A warp runs until a barrier holds it before the next one begins: the widest distance that barriers allow.
    for (int left = threads; left > 0;) {
      bool progress = false;
      for (int i = 0; i < threads / kWarp; ++i) {
        const int first = (descending ? threads / kWarp - 1 - i : i) * kWarp;
        for (bool again = true; again;) {
          again = false;
          for (int lane = 0; lane < kWarp; ++lane) {
            const int index = first + (descending ? kWarp - 1 - lane : lane);
            Fiber& fiber = *fibers_[index];
            if (fiber.finished || !fiber.runnable) continue;
            yielded_ = false;
            resume(index);
            if (fiber.finished) --left;
            progress = true;
            again |= !yielded_;
          }
        }
      }
      if (!progress) fail("a barrier or collective that not all threads reach");
    }
  }

  static void start();

  void resume(int index) {
    current_ = index;
    threadIdx = {static_cast<unsigned>(index), 0, 0};
    Fiber& fiber = *fibers_[index];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack.get(), kStackBytes);
#endif
    if (fiber.begun) {
      change(scheduler_, fiber.place);
    } else {
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = fiber.stack.get();
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, reinterpret_cast<void (*)()>(&Device::start), 0);
      fiber.begun = true;
      begin(scheduler_, context);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  void suspend(bool finished = false, bool runnable = false) {
    Fiber& fiber = *fibers_[current_];
    fiber.runnable = runnable;
    fiber.finished = finished;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack_, scheduler_stack_size_);
#endif
    change(fiber.place, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  std::function<void()> entry_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Rendezvous> warps_;
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  std::unique_ptr<unsigned char, Free> shared_;
  Place scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  std::vector<Copy> copies_;
  size_t waiting_ = 0;
  int current_ = 0, idle_ = 0;
  bool yielded_ = false;
};

inline Device& device() {
  static Device instance;
  return instance;
}

inline void Device::start() {
  Device& self = device();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_size_);
#endif
  for (;;) {  // a thread of one block after the other
    self.entry_();
    self.suspend(true);
  }
}

inline unsigned char* shared_memory() { return device().shared(); }

template <class To, class From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Rounds a float to a type of fewer mantissa bits and a smaller exponent range,
// ties to even, with gradual underflow; the result is given as a float.
inline float round_to(float value, int mantissa_bits, int minimum_exponent, float maximum) {
  if (!std::isfinite(value) || value == 0.0f) return value;
  const int exponent = std::max(std::ilogb(value), minimum_exponent);
  const float unit = std::ldexp(1.0f, exponent - mantissa_bits);
  const float rounded = static_cast<float>(std::nearbyint(static_cast<double>(value) / unit) * unit);
  return std::fabs(rounded) > maximum ? std::copysign(INFINITY, value) : rounded;
}

}  // namespace emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::omitted(file, line)) emulation::device().barrier();
}

inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  uint32_t nothing = 0;
  if (!emulation::omitted(file, line))
    emulation::device().collective("__syncwarp", &nothing, 0, 0, [](auto&, auto&) {});
}

namespace sgr::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

inline float __int_as_float(int value) { return emulation::bits_of<float>(value); }
inline int __float_as_int(float value) { return emulation::bits_of<int>(value); }
inline float __uint_as_float(unsigned value) { return emulation::bits_of<float>(value); }
inline unsigned __float_as_uint(float value) { return emulation::bits_of<unsigned>(value); }
inline unsigned fresh_thread_index() { return threadIdx.x; }
template <class T>
T* kept(T* pointer) {
  return pointer;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline void raise(unsigned* address, unsigned value) { *address = max(*address, value); }
struct Arrival {
  uint64_t* barrier;  // of which the emulated one counts the phases that have begun
  unsigned phase = 0;

  static void release() {}
  void prepare() const {
    if (threadIdx.x == 0) *barrier = 0;
  }
  void expect(int) const {
    if (threadIdx.x == 0) ++*barrier;
  }
  void copy(void* target, const void* source, int bytes) const {
    if (bytes % 16) emulation::fail("a copy of no multiple of 16 bytes");
    if (threadIdx.x == 0)
      emulation::device().send(
          {barrier, static_cast<uint32_t*>(target), static_cast<const uint32_t*>(source), bytes / 4});
  }
  void wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (emulation::omitted(file, line)) return;
    if (*barrier > 1u << 30) emulation::fail("waiting at what is not prepared");
    while (*barrier <= phase) emulation::device().yield();
    emulation::device().complete(barrier);
    ++phase;
  }
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

constexpr double kPi = 3.14159265358979323846;
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fabsf(float x) { return std::fabs(x); }
inline float sqrtf(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::fabs;
using std::fmax;
using std::isfinite;
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned before = *address;
  *address = before >= limit ? 0 : before + 1;
  return before;
}
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(kPi * x);
  *cosine = std::cos(kPi * x);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  std::memcpy(words, &value, sizeof(T));
  emulation::device().collective("shuffle", words, kWords, kWords, [=](auto& in, auto& out) {
    for (int lane = 0; lane < emulation::kWarp; ++lane) std::memcpy(out[lane], in[lane ^ distance], sizeof(T));
  });
  std::memcpy(&value, words, sizeof(T));
  return value;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  emulation::device().collective("reduce", &value, 1, 1, [](auto& in, auto& out) {
    uint32_t largest = 0;
    for (auto& words : in) largest = max(largest, words[0]);
    for (auto& words : out) words[0] = largest;
  });
  return value;
}

inline float half_to_float(uint16_t bits) { return static_cast<float>(emulation::bits_of<_Float16>(bits)); }
inline uint16_t float_to_half(float value) { return emulation::bits_of<uint16_t>(static_cast<_Float16>(value)); }
inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
inline uint16_t float_to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  return __float_as_uint(emulation::round_to(value, 7, -126, 3.3895314e38f)) >> 16;
}
inline uint32_t half_pair(float even, float odd) {
  return float_to_half(even) | static_cast<uint32_t>(float_to_half(odd)) << 16;
}
inline float2 half_pair_to_floats(uint32_t word) { return {half_to_float(word & 0xffff), half_to_float(word >> 16)}; }
inline uint32_t bfloat16_pair(float even, float odd) {
  return float_to_bfloat16(even) | static_cast<uint32_t>(float_to_bfloat16(odd)) << 16;
}
inline uint32_t round_to_tf32(float value) {
  if (!std::isfinite(value)) return __float_as_uint(value);
  return (__float_as_uint(value) + 0x1000u) & 0xffffe000u;  // ties away from zero
}

}  // namespace sgr::cuda

#include "emulated_matrix_unit.h"
