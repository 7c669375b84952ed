// What schedules are made of. LAUNCHER is the machine: CUDA's in launch.h, the emulated one in the tests.
//
//   int shared_limit, multiprocessors      bytes of shared memory that a block may have; of the device
//   int64_t resident_blocks(kernel, threads, shared bytes)   blocks that the device holds at a time
//   T* workspace<T>(count)        device memory that lives as long as the launcher
//   const T* constants<T>(key, build)      device memory with the std::vector<T> that build() returns, kept for good
//   launch(kernel, blocks in x, blocks in y, threads, shared bytes, arguments...)
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

namespace sgr::cuda {

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// action(N), N == number known when this is compiled, if there is one from 1 to MOST; otherwise false.
template <int MOST, class Action>
bool with_number(int number, Action action) {
  if (number == MOST) return action(std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1) return with_number<MOST - 1>(number, action);
  return false;
}

}  // namespace sgr::cuda
