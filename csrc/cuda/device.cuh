// All that the kernels take from the machine: warp collectives, conversions and matrix instructions.
// nvcc maps them to instructions; the tests compile the same kernels as C++ with emulated ones.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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
__device__ inline uint32_t scale_half_pair(uint32_t word, float factor) {
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&word), __float2half2_rn(factor));
  return *reinterpret_cast<const uint32_t*>(&product);
}
__device__ inline uint32_t bfloat16_pair(float even, float odd) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(even, odd);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t round_to_tf32(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}

// threadIdx.x, read anew each time: what is computed from it does not occupy registers across a loop.
__device__ inline int fresh_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
__device__ inline void prefetch(const void* address) {  // into the L2 cache
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

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

// 2^exponent as two factors, to be applied one after the other, as it may exceed float's range.
struct PowerOfTwo {
  float first, second;

  __device__ explicit PowerOfTwo(int exponent) {
    exponent = exponent > 252 ? 252 : (exponent < -252 ? -252 : exponent);
    first = power_of_two(exponent / 2);
    second = power_of_two(exponent - exponent / 2);
  }
  __device__ float operator*(float value) const { return value * first * second; }
};

}  // namespace sgr::cuda
