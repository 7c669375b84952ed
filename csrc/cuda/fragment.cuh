// 16x16 tiles spread over a warp, and products of them on tensor cores in three precisions.
//
// Lane 4g + q holds, of a tile, the eight entries (row g + 8i, column 8n + 2q + j), i, n, j in {0, 1}. An
// mma accumulator has this layout, and both mma operands can be read in it: a as the matrix, b as its
// transpose. So  multiply(d, a, b): d += a b'  yields a tile that is an operand of the next product as it
// stands: a chain of products needs neither shuffles nor shared memory.
#pragma once

#include "device.cuh"
#include "rounding.h"

namespace sgr::cuda {

constexpr int kTile = 16;
constexpr int kLaneEntries = 8;
constexpr int kTileEntries = kTile * kTile;

struct Fragment {
  float value[kLaneEntries];

  __device__ float& at(int n, int i, int j) { return value[4 * n + 2 * i + j]; }
  __device__ float at(int n, int i, int j) const { return value[4 * n + 2 * i + j]; }
  // The four entries of columns 8n to 8n + 7: an mma accumulator.
  __device__ float* half(int n) { return value + 4 * n; }

  __device__ void operator+=(const Fragment& other) {
#pragma unroll
    for (int e = 0; e < kLaneEntries; ++e) value[e] += other.value[e];
  }
  __device__ void operator*=(float factor) {
#pragma unroll
    for (int e = 0; e < kLaneEntries; ++e) value[e] *= factor;
  }
  // += a b, entry by entry.
  __device__ void add_product(const Fragment& a, const Fragment& b) {
#pragma unroll
    for (int e = 0; e < kLaneEntries; ++e) value[e] += a.value[e] * b.value[e];
  }
};

__device__ inline int lane_row(int lane, int i) { return (lane >> 2) + 8 * i; }
__device__ inline int lane_column(int lane, int n, int j) { return 8 * n + 2 * (lane & 3) + j; }

// Where the pair (2 i, 2 i + 1) of a lane's v-th vector of four words lies: a warp moves 512 contiguous bytes at a
// time.
__device__ inline int pair_offset(int lane, int v, int i) { return (v * kWarp + lane) * 4 + 2 * i; }

// A tile ready for multiplication. Its words are in the order of the instruction's registers, which differs between
// the constant (matrix a) and the data (matrix b).
template <int WORDS>
struct Words {
  uint32_t word[WORDS];
};

template <int WORDS>
__device__ inline void load_tile(Words<WORDS>& tile, const uint32_t* memory, int lane) {
#pragma unroll
  for (int v = 0; v < WORDS / 4; ++v) {
    const uint4 vector = *reinterpret_cast<const uint4*>(memory + pair_offset(lane, v, 0));
    tile.word[4 * v] = vector.x;
    tile.word[4 * v + 1] = vector.y;
    tile.word[4 * v + 2] = vector.z;
    tile.word[4 * v + 3] = vector.w;
  }
}
template <int WORDS>
__device__ inline void store_tile(const Words<WORDS>& tile, uint32_t* memory, int lane) {
#pragma unroll
  for (int v = 0; v < WORDS / 4; ++v)
    *reinterpret_cast<uint4*>(memory + pair_offset(lane, v, 0)) =
        make_uint4(tile.word[4 * v], tile.word[4 * v + 1], tile.word[4 * v + 2], tile.word[4 * v + 3]);
}
__device__ inline Fragment load_fragment(const float* memory, int lane) {
  Fragment tile;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 vector = *reinterpret_cast<const float4*>(memory + pair_offset(lane, n, 0));
    tile.at(n, 0, 0) = vector.x;
    tile.at(n, 0, 1) = vector.y;
    tile.at(n, 1, 0) = vector.z;
    tile.at(n, 1, 1) = vector.w;
  }
  return tile;
}
__device__ inline void store_fragment(const Fragment& tile, float* memory, int lane) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
    *reinterpret_cast<float4*>(memory + pair_offset(lane, n, 0)) =
        make_float4(tile.at(n, 0, 0), tile.at(n, 0, 1), tile.at(n, 1, 0), tile.at(n, 1, 1));
}

// d += a b' as a sum of the format's partial products; several of them take turns, as each waits for the one before.
template <class FORMAT>
struct Products {
  template <int COUNT, class Constant, class Tile>
  __device__ static void multiply(Fragment* d, const Constant& a, const Tile* b) {
#pragma unroll
    for (int part = 0; part < FORMAT::kParts; ++part)
#pragma unroll
      for (int i = 0; i < COUNT; ++i) FORMAT::multiply_part(part, d[i], a, b[i]);
  }
  template <class Constant, class Tile>
  __device__ static void multiply(Fragment& d, const Constant& a, const Tile& b) {
    multiply<1>(&d, a, &b);
  }
};

// What the formats of 16-bit numbers have in common.
struct Pairs {
  template <int WORDS>
  __device__ static void negate_odd_columns(Words<WORDS>& tile) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) tile.word[w] ^= 0x80000000u;
  }
  template <int WORDS>
  __device__ static void negate_odd_rows(Words<WORDS>& tile, int lane) {
    const uint32_t mask = (lane >> 2) & 1 ? 0x80008000u : 0u;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) tile.word[w] ^= mask;
  }
};

// One rounding to bf16.
struct BrainFloat : Pairs, Products<BrainFloat> {
  static constexpr int kWords = 4, kKind = 3, kParts = 1;
  using Tile = Words<kWords>;
  using Constant = Tile;

  static void constant_words(const double (&x)[kLaneEntries], uint32_t (&words)[4]) {
    for (int pair = 0; pair < 4; ++pair)
      words[pair] = bfloat16_bits(x[2 * pair]) | static_cast<uint32_t>(bfloat16_bits(x[2 * pair + 1])) << 16;
  }
  __device__ static Tile data(const Fragment& x) {
    Tile tile;
#pragma unroll
    for (int w = 0; w < 4; ++w) tile.word[w] = bfloat16_pair(x.at(w % 2, w / 2, 0), x.at(w % 2, w / 2, 1));
    return tile;
  }
  __device__ static void store_pair(uint32_t* memory, int lane, int n, int i, float even, float odd) {
    memory[pair_offset(lane, 0, i) + n] = bfloat16_pair(even, odd);
  }
  __device__ static void multiply_part(int, Fragment& d, const Tile& a, const Tile& b) {
    multiply_words(d, a.word, b.word);
  }
  __device__ static void multiply_words(Fragment& d, const uint32_t* a, const uint32_t* b) {
#pragma unroll
    for (int m = 0; m < 2; ++m) mma_m16n8k16_bf16(d.half(m), a[0], a[1], a[2], a[3], b[2 * m], b[2 * m + 1]);
  }
};

// x = high + low in two fp16 numbers: 22 bits of what is scaled to its maximum, as all inputs of forward transforms
// are. Three of the four partial products carry float32 accuracy.
struct SplitHalf : Pairs, Products<SplitHalf> {
  static constexpr int kWords = 8, kKind = 1, kParts = 3;
  using Tile = Words<kWords>;  // four words of high parts, four of low ones
  using Constant = Tile;

  static void constant_words(const double (&x)[kLaneEntries], uint32_t (&words)[8]) {
    for (int pair = 0; pair < 4; ++pair) {
      uint16_t high[2], low[2];
      for (int j = 0; j < 2; ++j) {
        high[j] = half_bits(x[2 * pair + j]);
        low[j] = half_bits(x[2 * pair + j] - half_value(high[j]));
      }
      words[pair] = high[0] | static_cast<uint32_t>(high[1]) << 16;
      words[4 + pair] = low[0] | static_cast<uint32_t>(low[1]) << 16;
    }
  }
  __device__ static Tile data(const Fragment& x) { return data(x, half_pair); }
  template <class Low>
  __device__ static Tile data(const Fragment& x, Low low_pair) {
    Tile tile;
#pragma unroll
    for (int w = 0; w < 4; ++w)
      split(x.at(w % 2, w / 2, 0), x.at(w % 2, w / 2, 1), tile.word[w], tile.word[4 + w], low_pair);
    return tile;
  }
  // A pair of a data tile that lies in memory as store_tile does it.
  __device__ static void store_pair(uint32_t* memory, int lane, int n, int i, float even, float odd) {
    split(even, odd, memory[pair_offset(lane, 0, i) + n], memory[pair_offset(lane, 1, i) + n], half_pair);
  }
  __device__ static void multiply_part(int part, Fragment& d, const Tile& constant, const Tile& data) {
    const uint32_t *a = constant.word + (part == 1 ? 4 : 0), *b = data.word + (part == 0 ? 4 : 0);
#pragma unroll
    for (int m = 0; m < 2; ++m) mma_m16n8k16_f16(d.half(m), a[0], a[1], a[2], a[3], b[2 * m], b[2 * m + 1]);
  }

 private:
  template <class Low>
  __device__ static void split(float even, float odd, uint32_t& high, uint32_t& low, Low low_pair) {
    high = half_pair(even, odd);
    const float2 rounded = half_pair_to_floats(high);
    low = low_pair(even - rounded.x, odd - rounded.y);
  }
};

// x = high + low in fp16 and bf16: 20 bits, and low parts of any size, as a spectrum spans many powers of ten. bf16
// meets bf16 only: constants come rounded to it besides.
struct SplitWide : Pairs, Products<SplitWide> {
  static constexpr int kWords = SplitHalf::kWords, kKind = 4, kParts = 3;
  using Tile = SplitHalf::Tile;
  struct Constant {
    SplitHalf::Tile split;
    BrainFloat::Tile rounded;
  };

  __device__ static Tile data(const Fragment& x) { return SplitHalf::data(x, bfloat16_pair); }
  __device__ static void negate_odd_rows(Constant& constant, int lane) {
    Pairs::negate_odd_rows(constant.split, lane);
    Pairs::negate_odd_rows(constant.rounded, lane);
  }
  __device__ static void multiply_part(int part, Fragment& d, const Constant& a, const Tile& b) {
    if (part == 0)
      BrainFloat::multiply_words(d, a.rounded.word, b.word + 4);
    else
      SplitHalf::multiply_part(part, d, a.split, b);
  }
};

// Constant tiles as constant_tiles lays them out: `rounded` is SplitWide's alone.
struct ConstantTiles {
  const uint32_t *tiles, *rounded;
};
template <int WORDS>
__device__ inline void load_constant(Words<WORDS>& constant, const ConstantTiles& from, int index, int lane) {
  load_tile(constant, from.tiles + index * WORDS * kWarp, lane);
}
__device__ inline void load_constant(SplitWide::Constant& constant, const ConstantTiles& from, int index, int lane) {
  load_constant(constant.split, from, index, lane);
  load_constant(constant.rounded, {from.rounded, nullptr}, index, lane);
}

// One rounding to tf32. Within each group of eight, mma's k index is permuted so that a lane's pair of adjacent columns
// serves as its two k slots.
struct TensorFloat : Products<TensorFloat> {
  static constexpr int kWords = 8, kKind = 2, kParts = 2;
  using Tile = Words<kWords>;
  using Constant = Tile;

  __device__ static Tile constant(const Fragment& x) {
    Tile tile;
#pragma unroll
    for (int e = 0; e < kLaneEntries; ++e) tile.word[e] = round_to_tf32(x.at(e / 4, e % 2, e / 2 % 2));
    return tile;
  }
  __device__ static Tile data(const Fragment& x) {
    Tile tile;
#pragma unroll
    for (int e = 0; e < kLaneEntries; ++e) tile.word[e] = round_to_tf32(x.value[e]);
    return tile;
  }
  static void constant_words(const double (&x)[kLaneEntries], uint32_t (&words)[8]) {
    for (int e = 0; e < kLaneEntries; ++e) words[e] = tf32_bits(x[e / 4 * 4 + e % 2 * 2 + e / 2 % 2]);
  }
  __device__ static void store_pair(uint32_t* memory, int lane, int n, int i, float even, float odd) {
    *reinterpret_cast<uint2*>(memory + pair_offset(lane, n, i)) = make_uint2(round_to_tf32(even), round_to_tf32(odd));
  }
  __device__ static void negate_odd_columns(Tile& tile) {
#pragma unroll
    for (int w = 0; w < 8; ++w)
      if (w & 2) tile.word[w] ^= 0x80000000u;
  }
  __device__ static void negate_odd_rows(Tile& tile, int lane) {
    const uint32_t mask = (lane >> 2) & 1 ? 0x80000000u : 0u;
#pragma unroll
    for (int w = 0; w < 8; ++w) tile.word[w] ^= mask;
  }

  __device__ static void multiply_part(int part, Fragment& d, const Tile& constant, const Tile& data) {
    const uint32_t *a = constant.word + 4 * part, *b = data.word + 4 * part;
#pragma unroll
    for (int m = 0; m < 2; ++m) mma_m16n8k8_tf32(d.half(m), a[0], a[1], a[2], a[3], b[2 * m], b[2 * m + 1]);
  }
  __device__ static Fragment product(const Tile& a, const Tile& b) {
    Fragment sum{};
    multiply(sum, a, b);
    return sum;
  }
};

// x = high + low in two tf32 numbers: float32 accuracy over float32's whole range, at twice SplitHalf's price.
struct SplitTensorFloat {
  struct Tile {
    Words<8> high, low;
  };

  __device__ static Tile constant(const Fragment& x) {
    return {TensorFloat::constant(x), TensorFloat::constant(residual(x))};
  }
  __device__ static Tile data(const Fragment& x) { return {TensorFloat::data(x), TensorFloat::data(residual(x))}; }
  // The product alone: over long sums, tensor cores cut off what float32 additions round.
  __device__ static Fragment product(const Tile& a, const Tile& b) {
    Fragment sum{};
    TensorFloat::multiply(sum, a.low, b.high);
    TensorFloat::multiply(sum, a.high, b.low);
    TensorFloat::multiply(sum, a.high, b.high);
    return sum;
  }

 private:
  __device__ static Fragment residual(const Fragment& x) {
    Fragment rest;
#pragma unroll
    for (int e = 0; e < kLaneEntries; ++e) {
      rest.value[e] = x.value[e] - __uint_as_float(round_to_tf32(x.value[e]));
    }
    return rest;
  }
};

// The caller's choice, in torch's words; the tolerances stand in the operators' documentation.
struct Highest {
  using Forward = SplitHalf;
  using Inverse = SplitWide;
};
struct High {
  using Forward = TensorFloat;
  using Inverse = TensorFloat;
};
struct Medium {
  using Forward = BrainFloat;
  using Inverse = BrainFloat;
};

}  // namespace sgr::cuda
