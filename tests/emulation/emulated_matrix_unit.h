// The tensor cores' part of the emulated device: products of small matrices, spread over a warp as the PTX manual has
// them, with the sums that the unit forms. emulated_device.h includes this file.
#pragma once

namespace emulation {

// The sum that a matrix unit forms: products are exact, all addends are aligned
// to the largest one and cut off two bits below float's last, and the sum is
// rounded towards zero.
SGR_UNWATCHED inline float matrix_unit_sum(float start, const double* products, int count) {
  double largest = std::fabs(static_cast<double>(start)), plain = start;
  for (int i = 0; i < count; ++i) {
    const double size = std::fabs(products[i]);
    if (size > largest) largest = size;
    plain += products[i];
  }
  if (!std::isfinite(plain) || largest == 0.0) return static_cast<float>(plain);
  const uint64_t exponent = bits_of<uint64_t>(largest) >> 52;
  const double unit = bits_of<double>((exponent - 25) << 52), inverse = 1.0 / unit;
  int64_t sum = static_cast<int64_t>(start * inverse);
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(products[i] * inverse);
  const double exact = static_cast<double>(sum) * unit;
  const float rounded = static_cast<float>(exact);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(exact) ? std::nextafter(rounded, 0.0f) : rounded;
}

// mma of a 16 x DEPTH and a DEPTH x 8 matrix. unpack(word, slot) gives an
// element of an operand word, of which a word holds `per_word`; the layouts are
// those of the PTX manual for m16n8k16 (16 bits) and m16n8k8 (tf32).
template <int DEPTH, class Unpack>
void mma(const char* name, int per_word, float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1, Unpack unpack) {
#ifdef SGR_COUNT_ONLY
  asm volatile("" : "+m"(*reinterpret_cast<float (*)[4]>(d)) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  return;  // what has been read counts as used
#endif
  uint32_t words[10] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(words + 6, d, 4 * sizeof(float));
  device().collective(name, words, 10, 4, [=](auto& in, auto& out) SGR_UNWATCHED {
    float a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 4; ++i)
        for (int slot = 0; slot < per_word; ++slot) {
          const int row = i % 2 ? group + 8 : group;
          const int k = in_group * per_word + slot + (i >= 2 ? DEPTH / 2 : 0);
          a[row][k] = unpack(in[lane][i], slot);
          if (i < 2) b[in_group * per_word + slot + i * DEPTH / 2][group] = unpack(in[lane][4 + i], slot);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
        double products[DEPTH];
        for (int k = 0; k < DEPTH; ++k) products[k] = static_cast<double>(a[row][k]) * b[k][column];
        const float sum = matrix_unit_sum(bits_of<float>(in[lane][6 + i]), products, DEPTH);
        out[lane][i] = bits_of<uint32_t>(sum);
      }
  });
  std::memcpy(d, words, 4 * sizeof(float));
}

}  // namespace emulation

namespace sgr::cuda {

inline void mma_m16n8k16_f16(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma<16>("mma f16", 2, d, a0, a1, a2, a3, b0, b1, [](uint32_t word, int slot) {
    return half_to_float(static_cast<uint16_t>(slot ? word >> 16 : word));
  });
}
inline void mma_m16n8k16_bf16(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma<16>("mma bf16", 2, d, a0, a1, a2, a3, b0, b1, [](uint32_t word, int slot) {
    return bfloat16_to_float(static_cast<uint16_t>(slot ? word >> 16 : word));
  });
}
// The unit reads the upper 19 bits of a tf32 operand, whatever the others are.
inline void mma_m16n8k8_tf32(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma<8>("mma tf32", 1, d, a0, a1, a2, a3, b0, b1,
                    [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
}

}  // namespace sgr::cuda
