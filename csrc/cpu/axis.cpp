#include "axis.h"

namespace sgr::cpu {
namespace {

// Calls add(start, size) for an even partition of [0, count) into pieces of at most max_block.
template <class F>
void for_each_piece(int64_t count, int max_block, const F& add) {
  const int64_t pieces = (count + max_block - 1) / max_block;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t start = i * count / pieces, end = (i + 1) * count / pieces;
    add(start, static_cast<int>(end - start));
  }
}

}  // namespace

template <class T>
Axis<T>::Axis(int64_t pixels, int64_t frequencies, int max_block)
    : pixels(pixels),
      frequencies(frequencies),
      center((pixels - 1) / 2),
      reach(pixels / 2),
      low((frequencies + 1) / 2) {
  const OddFrequencies odd(frequencies);
  for (const bool sine : {false, true}) {
    for_each_piece(low, max_block, [&](int64_t k, int size) { add_forward(odd, k, size, sine); });
  }
  for (const int64_t parity : {0, 1}) {
    for_each_piece(positions_from(parity), max_block,
                   [&](int64_t i, int size) { add_inverse(odd, 2 * i + parity, size); });
  }
}

template <class T>
int32_t Axis<T>::positions_from(int64_t first) const {
  return first > reach ? 0 : static_cast<int32_t>((reach - first) / 2 + 1);
}

template <class T>
void Axis<T>::add_forward(const OddFrequencies& odd, int64_t k, int size, bool sine) {
  const int64_t first_p = sine ? 1 : 0, first_q = sine ? 2 : 1, base = sine ? frequencies : 0;
  Block block;
  block.size = size;
  block.terms_p = positions_from(first_p);
  block.terms_q = positions_from(first_q);
  block.input_p = static_cast<int32_t>(pixel_class(sine ? 2 : 0));
  block.input_q = static_cast<int32_t>(pixel_class(sine ? 3 : 1));
  block.plus = static_cast<int32_t>(base + k);
  block.plus_step = 1;
  block.minus = static_cast<int32_t>(base + frequencies - 1 - k);
  block.minus_step = -1;
  block.last_has_partner = true;  // a middle frequency is its own: its Q is zero, and P - Q = P + Q
  block.coefficients = static_cast<int64_t>(coefficients.size());
  for (int half = 0; half < 2; ++half) {
    for (int64_t s = half == 0 ? first_p : first_q; s <= reach; s += 2) {
      for (int r = 0; r < size; ++r) {
        const double value = sine ? odd.sine(s, k + r) : odd.cosine(s, k + r);
        coefficients.push_back(static_cast<T>(odd.scale() * value));
      }
    }
  }
  forward.push_back(block);
}

template <class T>
void Axis<T>::add_inverse(const OddFrequencies& odd, int64_t s, int size) {
  const bool even = s % 2 == 0;
  Block block;
  block.size = size;
  block.terms_p = block.terms_q = static_cast<int32_t>(low);
  block.input_p = static_cast<int32_t>(frequency_class(even ? 0 : 1));
  block.input_q = static_cast<int32_t>(frequency_class(even ? 3 : 2));
  block.plus = static_cast<int32_t>(center + s);
  block.plus_step = 2;
  block.minus = static_cast<int32_t>(center - s);
  block.minus_step = -2;
  block.last_has_partner = s + 2 * (size - 1) <= center;  // position 0 is its own: its Q is zero
  block.coefficients = static_cast<int64_t>(coefficients.size());
  for (const bool sine : {false, true}) {
    for (int64_t k = 0; k < low; ++k) {
      for (int r = 0; r < size; ++r) {
        const double value = sine ? odd.sine(s + 2 * r, k) : odd.cosine(s + 2 * r, k);
        coefficients.push_back(static_cast<T>(odd.scale() * value));
      }
    }
  }
  inverse.push_back(block);
}

template struct Axis<float>;
template struct Axis<double>;

}  // namespace sgr::cpu
