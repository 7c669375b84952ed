// The choice of an instruction set at run time.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace sgr::cpu {

#define SGR_DECLARE(isa)       \
  namespace isa {              \
  template <class T>           \
  const Kernels<T>& kernels(); \
  }
SGR_DECLARE(baseline)
SGR_DECLARE(avx2)
SGR_DECLARE(avx512)
#undef SGR_DECLARE

namespace {

struct InstructionSet {
  const char* name;
  bool (*available)();
  const Kernels<float>& (*single_precision)();
  const Kernels<double>& (*double_precision)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, avx512::kernels<float>, avx512::kernels<double>},
    {"avx2", has_avx2, avx2::kernels<float>, avx2::kernels<double>},
#endif
    {"baseline", [] { return true; }, baseline::kernels<float>, baseline::kernels<double>},
};

std::atomic<const InstructionSet*> selected{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = selected.load(std::memory_order_acquire);
  if (set == nullptr) {
    set = kSets;
    while (!set->available()) ++set;
    selected.store(set, std::memory_order_release);
  }
  return *set;
}

}  // namespace

int instruction_sets(const char* names[], int capacity) {
  int count = 0;
  for (const InstructionSet& set : kSets) {
    if (set.available() && count < capacity) names[count++] = set.name;
  }
  return count;
}

bool select_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.available()) {
      selected.store(&set, std::memory_order_release);
      return true;
    }
  }
  return false;
}

template <>
const Kernels<float>& kernels<float>() {
  return current().single_precision();
}

template <>
const Kernels<double>& kernels<double>() {
  return current().double_precision();
}

}  // namespace sgr::cpu
