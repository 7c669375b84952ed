#include "axis.h"

#include <cmath>
#include <numeric>

namespace sgr::cpu {
namespace {

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

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
DirectTransform<T>::DirectTransform(int64_t pixels, int64_t frequencies, int max_block)
    : pixels(pixels),
      frequencies(frequencies),
      center((pixels - 1) / 2),
      reach(pixels / 2),
      low((frequencies + 1) / 2) {
  const Angles angles(frequencies);
  for (const bool sine : {false, true}) {
    for_each_piece(low, max_block, [&](int64_t k, int size) { add_forward(angles, k, size, sine); });
  }
  for (const int64_t parity : {0, 1}) {
    for_each_piece(positions_from(parity), max_block,
                   [&](int64_t i, int size) { add_inverse(angles, 2 * i + parity, size); });
  }
}

template <class T>
int32_t DirectTransform<T>::positions_from(int64_t first) const {
  return first > reach ? 0 : narrow((reach - first) / 2 + 1);
}

template <class T>
void DirectTransform<T>::add_forward(const Angles& angles, int64_t k, int size, bool sine) {
  const int64_t first_p = sine ? 1 : 0, first_q = sine ? 2 : 1, base = sine ? frequencies : 0;
  const double scale = 1.0 / std::sqrt(static_cast<double>(frequencies));
  const auto wave = [&](int64_t s, int64_t r) {
    const int64_t angle = s * (2 * (k + r) + 1);
    return scale * (sine ? angles.sine(angle) : angles.cosine(angle));
  };
  Block block;
  block.size = size;
  block.terms_p = positions_from(first_p);
  block.terms_q = positions_from(first_q);
  block.input_p = narrow(pixel_class(sine ? 2 : 0));
  block.input_q = narrow(pixel_class(sine ? 3 : 1));
  block.plus = narrow(base + k);
  block.plus_step = 1;
  block.minus = narrow(base + frequencies - 1 - k);
  block.minus_step = -1;
  block.has_plus = block.last_has_partner = true;  // a middle frequency is its own partner: its Q is zero
  forward.add(
      block, [&](int64_t i, int64_t r) { return wave(first_p + 2 * i, r); },
      [&](int64_t i, int64_t r) { return wave(first_q + 2 * i, r); });
}

template <class T>
void DirectTransform<T>::add_inverse(const Angles& angles, int64_t s, int size) {
  const bool even = s % 2 == 0;
  const double scale = 1.0 / std::sqrt(static_cast<double>(frequencies));
  Block block;
  block.size = size;
  block.terms_p = block.terms_q = narrow(low);
  block.input_p = narrow(frequency_class(even ? 0 : 1));
  block.input_q = narrow(frequency_class(even ? 3 : 2));
  block.plus = narrow(center + s);
  block.plus_step = 2;
  block.minus = narrow(center - s);
  block.minus_step = -2;
  block.has_plus = true;
  block.last_has_partner = s + 2 * (size - 1) <= center;  // position 0 is its own partner: its Q is zero
  inverse.add(
      block, [&](int64_t k, int64_t r) { return scale * angles.cosine((s + 2 * r) * (2 * k + 1)); },
      [&](int64_t k, int64_t r) { return scale * angles.sine((s + 2 * r) * (2 * k + 1)); });
}

template <class T>
Axis<T>::Axis(int64_t pixels, int64_t frequencies, int max_block)
    : frequencies(frequencies),
      length(best_length(pixels, frequencies)),
      direct(pixels / length, frequencies / length, max_block) {
  if (length == 1) return;
  // Outputs in falling order, so that the one without a mirror image, 0, is the last of its block; so is the one in
  // the middle of an even length its own: above pi, it has a row as a mirror image only.
  const Angles angles(length);
  const int64_t pairs = (length - 1) / 2 + 1;
  if (length % 2 == 0) add_forward(angles, length / 2, 1);
  for_each_piece(pairs, max_block, [&](int64_t i, int size) { add_forward(angles, pairs - 1 - i, size); });
  for_each_piece(length / 2 + 1, max_block, [&](int64_t i, int size) { add_inverse(angles, length / 2 - i, size); });
  const Angles fine(frequencies);
  for (int64_t q = 0; q < direct.frequencies; ++q) {
    for (int64_t n = 0; n < length; ++n) {
      rotations.push_back(static_cast<T>(fine.cosine(n * (2 * q + 1))));
      rotations.push_back(static_cast<T>(fine.sine(n * (2 * q + 1))));
    }
  }
}

// The length with the fewest operations per axis; it divides both numbers.
template <class T>
int64_t Axis<T>::best_length(int64_t pixels, int64_t frequencies) {
  constexpr int64_t kSecondLevel = 24;  // what the rotations and passes over memory cost per frequency: measured
  int64_t best = 1, best_cost = pixels * frequencies / 2;
  const int64_t common = std::gcd(pixels, frequencies);
  for (int64_t length = 2; length <= common; ++length) {
    if (common % length != 0) continue;
    const int64_t cost = pixels * (frequencies / length) / 2 + frequencies * (length + kSecondLevel);
    if (cost < best_cost) {
      best = length;
      best_cost = cost;
    }
  }
  return best;
}

// Outputs h, h - 1, .. and their mirror images from inputs n. The angle of n h is 2 pi n h / m.
template <class T>
void Axis<T>::add_forward(const Angles& angles, int64_t h, int size) {
  const int64_t step = 2 * direct.frequencies, full = length / 2 + 1, partial = (length - 1) / 2;
  const double scale = 1.0 / std::sqrt(static_cast<double>(length));
  const auto cosine = [&](int64_t n, int64_t r) { return scale * angles.cosine(4 * n * (h - r)); };
  const auto sine = [&](int64_t n, int64_t r) { return scale * angles.sine(4 * n * (h - r)); };
  Block block;
  block.size = size;
  block.terms_p = narrow(full);
  block.terms_q = narrow(partial);
  block.input_p = narrow(fourier_class(0));
  block.input_q = narrow(fourier_class(2));
  block.plus = narrow(step * h);
  block.minus = narrow(step * h - 1);
  block.plus_step = block.minus_step = narrow(-step);
  block.has_plus = 2 * h != length;
  block.last_has_partner = h - (size - 1) != 0;
  forward.add(block, cosine, [&](int64_t i, int64_t r) { return -sine(i + 1, r); });

  block.terms_p = narrow(partial);
  block.terms_q = narrow(full);
  block.input_p = narrow(fourier_class(3));
  block.input_q = narrow(fourier_class(1));
  block.plus += narrow(frequencies);
  block.minus += narrow(frequencies);
  forward.add(block, [&](int64_t i, int64_t r) { return sine(i + 1, r); }, cosine);
}

// Outputs n, n - 1, .. and m - n, .. from inputs h: cosines at rows n, sines at rows n + F.
template <class T>
void Axis<T>::add_inverse(const Angles& angles, int64_t n, int size) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(length));
  const auto cosine = [&](int64_t h, int64_t r) { return scale * angles.cosine(4 * h * (n - r)); };
  const auto sine = [&](int64_t h, int64_t r) { return scale * angles.sine(4 * h * (n - r)); };
  Block block;
  block.size = size;
  block.terms_p = narrow(length / 2 + 1);
  block.terms_q = narrow((length - 1) / 2);
  block.input_p = narrow(fourier_class(0));
  block.input_q = narrow(fourier_class(2));
  block.plus = narrow(n);
  block.plus_step = -1;
  block.minus = narrow(length - n);
  block.minus_step = 1;
  block.has_plus = true;
  block.last_has_partner = n - (size - 1) != 0;
  inverse.add(block, cosine, [&](int64_t i, int64_t r) { return sine(i + 1, r); });

  block.input_p = narrow(fourier_class(1));
  block.input_q = narrow(fourier_class(3));
  block.plus += narrow(frequencies);
  block.minus += narrow(frequencies);
  inverse.add(block, cosine, [&](int64_t i, int64_t r) { return -sine(i + 1, r); });
}

template struct DirectTransform<float>;
template struct DirectTransform<double>;
template struct Axis<float>;
template struct Axis<double>;

}  // namespace sgr::cpu
