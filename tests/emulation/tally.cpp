// What a call costs, counted by executing it: which kernels, in what grids,
// with what arguments, and the bytes of device memory that each launch reads
// and writes, all and distinct. Compiled with -fsanitize=thread and linked
// without its library: the compiler then reports every access to the functions
// below. Numbers are not computed.
//
//   tally OPERATOR BATCH CHANNELS HEIGHT WIDTH ROWS COLUMNS EXECUTE SHARED [KERNEL BLOCKS]...
//
// OPERATOR as in emulator.cpp, or 5: quadratic_form of an arranged spectrum; ROWS, COLUMNS: numbers of frequencies;
// SHARED: bytes of shared memory that a block may have; KERNEL BLOCKS: how many blocks of a kernel, by its symbol, a multiprocessor holds. A line per launch:
// kernel, symbol, grid, threads, shared bytes, arguments in hex, bytes.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "update_schedule.cuh"

#define SGR_PLAIN __attribute__((no_sanitize("thread")))

namespace {

// A run of device memory, and which of its words the running launch has read and written. Plain arrays: functions of
// the library would report their own accesses.
struct Buffer {
  int64_t size;
  char* memory;
  unsigned char* seen;
};
constexpr int kBuffers = 64;
constexpr int64_t kMemory = int64_t{1} << 32;
char* const memory = static_cast<char*>(
    mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
int64_t taken = 0;
Buffer buffers[kBuffers];
int buffer_count = 0;
bool counting = false;
int64_t bytes[2], distinct[2];  // read, written

char* add_buffer(int64_t size) {
  if (buffer_count == kBuffers || memory == MAP_FAILED || size > kMemory - taken) std::exit(4);
  buffers[buffer_count] = {size, memory + taken, static_cast<unsigned char*>(std::calloc(size / 4 + 1, 1))};
  taken += (size + 255) / 256 * 256;
  return buffers[buffer_count++].memory;
}

SGR_PLAIN void access(const void* address, int64_t size, int kind) {
  const uint64_t place = static_cast<const char*>(address) - memory;
  if (!counting || place >= static_cast<uint64_t>(taken)) return;
  for (int b = 0; b < buffer_count; ++b) {
    const int64_t offset = static_cast<const char*>(address) - buffers[b].memory;
    if (offset < 0 || offset >= buffers[b].size) continue;
    bytes[kind] += size;
    for (int64_t word = offset / 4; word <= (offset + size - 1) / 4; ++word)
      if (!(buffers[b].seen[word] & (1 << kind))) {
        buffers[b].seen[word] |= 1 << kind;
        distinct[kind] += 4;
      }
    return;
  }
}

}  // namespace

extern "C" {
#define SGR_ACCESS(size)                                                                  \
  SGR_PLAIN void __tsan_read##size(void* address) { access(address, size, 0); }           \
  SGR_PLAIN void __tsan_write##size(void* address) { access(address, size, 1); }          \
  SGR_PLAIN void __tsan_unaligned_read##size(void* address) { access(address, size, 0); } \
  SGR_PLAIN void __tsan_unaligned_write##size(void* address) { access(address, size, 1); }
SGR_ACCESS(1)
SGR_ACCESS(2)
SGR_ACCESS(4)
SGR_ACCESS(8)
SGR_ACCESS(16)
SGR_PLAIN void __tsan_read_range(void* address, unsigned long size) { access(address, size, 0); }
SGR_PLAIN void __tsan_write_range(void* address, unsigned long size) { access(address, size, 1); }
SGR_PLAIN void __tsan_init() {}
SGR_PLAIN void __tsan_func_entry(void*) {}
SGR_PLAIN void __tsan_func_exit() {}
SGR_PLAIN void __tsan_vptr_update(void**, void*) {}
SGR_PLAIN void __tsan_vptr_read(void**) {}
}

namespace {

using namespace sgr::cuda;

// Arguments as a kernel finds them: one after the other, each at its alignment.
template <class T>
void append(std::string& bytes, const T& value) {
  bytes.resize((bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <class... Parameters>
std::string pack(void (*)(Parameters...), const Parameters&... arguments) {
  std::string bytes;
  (append(bytes, arguments), ...);
  return bytes;
}

struct TallyLauncher {
  bool execute;
  int shared_limit;
  std::map<std::string, int> resident;
  int multiprocessors = 132;

  template <class Kernel>
  static std::string symbol(Kernel kernel) {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname) std::exit(3);
    return info.dli_sname;
  }
  template <class Kernel>
  int64_t resident_blocks(Kernel kernel, int, int) {
    const auto found = resident.find(symbol(kernel));
    return (found == resident.end() ? 1 : found->second) * static_cast<int64_t>(multiprocessors);
  }
  template <class T>
  T* workspace(int64_t count) {
    return reinterpret_cast<T*>(add_buffer(execute ? count * static_cast<int64_t>(sizeof(T)) : 16));
  }
  template <class T, class Build>
  const T* constants(const std::array<int64_t, 3>&, Build build) {
    if constexpr (!std::is_same_v<T, int>) {
      return workspace<T>(execute ? build().size() : 1);
    } else {  // how often a loop turns
      const std::vector<int> values = build();
      int* memory = reinterpret_cast<int*>(add_buffer(values.size() * sizeof(int)));
      std::copy(values.begin(), values.end(), memory);
      std::printf("constants\t%llu", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(memory)));
      for (int value : values) std::printf("\t%d", value);
      std::printf("\n");
      return memory;
    }
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes,
              const Arguments&... arguments) {
    for (int kind : {0, 1}) bytes[kind] = distinct[kind] = 0;
    if (execute) {
      for (int b = 0; b < buffer_count; ++b) std::memset(buffers[b].seen, 0, buffers[b].size / 4 + 1);
      counting = true;
      emulation::device().launch(kernel, blocks_x, blocks_y, threads, shared_bytes, arguments...);
      counting = false;
    }
    const std::string name = symbol(kernel);
    char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
    std::printf("%s\t%s\t%ld\t%ld\t%d\t%d\t", readable, name.c_str(), blocks_x, blocks_y, threads, shared_bytes);
    for (unsigned char byte : pack(kernel, static_cast<Parameters>(arguments)...)) std::printf("%02x", byte);
    std::printf("\t%ld\t%ld\t%ld\t%ld\n", bytes[0], bytes[1], distinct[0], distinct[1]);
    std::free(readable);
  }
};

float* floats(bool execute, int64_t count) {
  return reinterpret_cast<float*>(add_buffer(execute ? count * static_cast<int64_t>(sizeof(float)) : 16));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 10) return 2;
  const int operation = std::atoi(argv[1]);
  const Geometry geometry{std::atoll(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]),
                          std::atoi(argv[5]),  std::atoi(argv[6]), std::atoi(argv[7])};
  TallyLauncher launcher{std::atoi(argv[8]) != 0, std::atoi(argv[9]), {}};
  for (int i = 10; i + 1 < argc; i += 2) launcher.resident[argv[i]] = std::atoi(argv[i + 1]);

  const int64_t plane = static_cast<int64_t>(geometry.height) * geometry.width, channels = geometry.channels;
  const auto images = [&](float* data) {
    return ImageView{data, Element::kFloat32, {channels * plane, plane, geometry.width, 1}};
  };
  const ImageView gradient = images(floats(launcher.execute, geometry.batch * channels * plane));
  const int64_t frequencies = static_cast<int64_t>(geometry.rows) * geometry.columns;
  float* spectrum = floats(launcher.execute, channels * channels * frequencies);
  if (operation == 3) {
    compute_cross_spectrum(launcher, gradient, gradient, true, 1, Precision::kHighest, spectrum, geometry);
    return 0;
  }
  if (operation == 4) {
    const int side = geometry.height, bins = static_cast<int>(std::hypot(side - 1, side - 1) + 0.5) + 1;
    Estimate estimate{Binning::kRounded, {bins, 1}, 0.1, 1.0, true};
    estimate.values = floats(launcher.execute, channels * channels * bins);
    estimate.mean = floats(launcher.execute, channels * plane);
    estimate.scale = floats(launcher.execute, 1);
    estimate.table = floats(launcher.execute, channels * channels * plane);
    estimate.spectrum = spectrum;
    estimate.arranged = floats(launcher.execute, arranged_words(geometry));
    estimate.updates = launcher.workspace<int64_t>(1);
    estimate.skipped = launcher.workspace<int64_t>(1);
    estimate.arrivals = launcher.workspace<unsigned>(kMaximumGroups);
    for (int axis = 0; axis < 2; ++axis) estimate.table_size[axis] = estimate.spectrum_size[axis] = side;
    compute_update(launcher, gradient, estimate, Precision::kHighest, geometry);
    return 0;
  }
  const SpectrumView<float> lambda{spectrum, 1, 0, {channels * frequencies, frequencies, geometry.columns, 1}};
  const bool wants_product = operation != 2, wants_quadratic = operation != 0;
  const ImageView product =
      images(wants_product ? floats(launcher.execute, geometry.batch * channels * plane) : nullptr);
  const float* arranged = operation == 5 && arranged_words(geometry) > 0
                              ? floats(launcher.execute, arranged_words(geometry))
                              : nullptr;
  compute_product(launcher, gradient, lambda, arranged, product,
                  wants_quadratic ? floats(launcher.execute, geometry.batch) : nullptr, wants_quadratic,
                  Precision::kHighest, geometry);
  return 0;
}
