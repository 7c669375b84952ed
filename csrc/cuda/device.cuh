// All that the kernels take from the machine: warp collectives, conversions and matrix instructions.
// nvcc maps them to instructions; the tests compile the same kernels as C++ with emulated ones.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SGR_NOINLINE __noinline__
#define SGR_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace sgr::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ inline float bfloat16_to_float(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
__device__ inline uint16_t float_to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// Two values rounded to 16 bits each, `even` in the low half of the word.
__device__ inline uint32_t half_pair(float even, float odd) {
  const __half2 pair = __floats2half2_rn(even, odd);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline float2 half_pair_to_floats(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ inline uint32_t bfloat16_pair(float even, float odd) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(even, odd);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t round_to_tf32(float value) {
  uint32_t word;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));  // one instruction; the other takes three
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
#endif
  return word;
}

// threadIdx.x, read anew each time: what is computed from it does not occupy registers across a loop.
__device__ inline unsigned fresh_thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// A pointer into device memory that stays one: its terms are not taken apart and added up anew with each offset to it.
template <class T>
__device__ inline T* kept(T* pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// *shared = max(*shared, value), by one thread of a warp.
__device__ inline void raise(unsigned* shared, unsigned value) {
  asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(value)
               : "memory");
}

// Runs of device memory on their way into shared memory. A block's threads call everything together: expect() and the
// copies it announces, later wait(), then again. Addresses and sizes are multiples of 16 bytes, and what is
// overwritten has been read before the last __syncthreads(). Hopper's copy engine does it, elsewhere all threads.
struct Arrival {
  uint64_t* barrier;  // in shared memory
  unsigned phase = 0;

  // By each thread that has written what is overwritten, before the __syncthreads().
  __device__ static void release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ static unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
  }
  __device__ void prepare() const {  // before a __syncthreads()
    if (threadIdx.x > 0) return;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ void expect(int bytes) const {
    if (threadIdx.x > 0) return;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  }
  __device__ void copy(void* target, const void* source, int bytes) const {
    if (threadIdx.x > 0) return;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(target)),
                 "l"(source), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  }
  __device__ void wait() {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
    phase ^= 1;
  }
#else
  __device__ void prepare() const {}
  __device__ void expect(int) const {}
  __device__ void copy(void* target, const void* source, int bytes) const {
    unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(target)) + 16 * threadIdx.x;
    const char* from = static_cast<const char*>(source) + 16 * threadIdx.x;
    for (int left = bytes - 16 * static_cast<int>(threadIdx.x); left > 0; left -= 16 * blockDim.x) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
      to += 16 * blockDim.x;
      from += 16 * blockDim.x;
    }
  }
  __device__ void wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }
#endif
};

// Warp-wide d += a b for the 16x8 tile d, a row-major, b column-major, in PTX's fragment layouts.
__device__ inline void mma_m16n8k16_f16(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma_m16n8k16_bf16(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma_m16n8k8_tf32(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace sgr::cuda

#else
#include "emulated_device.h"
#endif

namespace sgr::cuda {

constexpr int kWarp = 32;

// Sum over the warp in a fixed order; every lane gets it.
template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Raises *maximum, in shared memory and zero before, to the largest magnitude of all threads' values.
__device__ inline void raise_maximum(unsigned* maximum, float magnitude) {
  const unsigned bits = __reduce_max_sync(kAllLanes, __float_as_uint(magnitude));
  if (threadIdx.x % kWarp == 0) raise(maximum, bits);
}

// Whether this block is the last of `count` that come here; it then sees what the others wrote before. The counter, in
// device memory, is zero before and after; `shared` is in shared memory.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned count, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicInc(counter, count - 1) + 1 == count;
  __syncthreads();
  __threadfence();
  return *shared != 0;
}

__device__ inline float power_of_two(int exponent) {  // -126 <= exponent <= 127
  return __int_as_float((exponent + 127) << 23);
}

// The exponent e, |e| <= 126, that brings a magnitude, given by its bits, below 2^ceiling: 2^(ceiling-1)
// <= |x| 2^e < 2^ceiling, as far as e reaches. Zero for infinities and NaNs, which then propagate.
__device__ inline int scaling_exponent(unsigned magnitude_bits, int ceiling) {
  const int biased = magnitude_bits >> 23;
  if (biased == 255) return 0;
  const int exponent = ceiling + 126 - (biased > 0 ? biased : 1);
  return exponent > 126 ? 126 : (exponent < -126 ? -126 : exponent);
}

// 2^exponent as two factors, to be applied one after the other, as it may exceed float's range; mostly the second is 1.
struct PowerOfTwo {
  float first, second;

  __device__ explicit PowerOfTwo(int exponent) {
    const int bounded = exponent > 100 ? 100 : (exponent < -100 ? -100 : exponent), rest = exponent - bounded;
    first = power_of_two(bounded);
    second = power_of_two(rest > 126 ? 126 : (rest < -126 ? -126 : rest));
  }
  __device__ float operator*(float value) const { return value * first * second; }
};

}  // namespace sgr::cuda
