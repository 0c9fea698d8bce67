// The squares of a gradient, added to the lanes of an exact sum (exact_sum.h says why they lose nothing). Only
// csrc/kernels.cpp includes it, which compiles it for each SIMD level.
#pragma once

#include "formats.h"
#include "kernels.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

template <class T>
struct PlainNumbers {
  using Compute = T;
  [[gnu::always_inline]] static Vector<T> load(const void* from, int64_t i, int64_t count) {
    return LUCID_LEVEL::load<Vector<T>>(static_cast<const T*>(from) + i, count);
  }
};

template <class Half>
struct HalfNumbers {
  using Compute = float;
  [[gnu::always_inline]] static Float load(const void* from, int64_t i, int64_t count) {
    Float x[1];
    Half::load(static_cast<const uint16_t*>(from) + i, count, x);
    return x[0];
  }
};

constexpr int square_vectors = 4;  // lanes of a bin

// Adds what is left of squares to the bins from `bin` on: each keeps the multiples of its last bit, the last the rest.
template <int bins>
[[gnu::always_inline]] inline void add_rest(Double rest, Double (&sums)[bins][square_vectors], int bin, int k) {
  for (; bin + 1 < bins; ++bin) {
    const Double sum = sums[bin][k] + rest;
    rest -= sum - sums[bin][k];
    sums[bin][k] = sum;
  }
  sums[bin][k] += rest;
}

template <int bins>
[[gnu::always_inline]] inline void add_squares(Double x, Double (&sums)[bins][square_vectors], int k) {
  add_rest(x * x, sums, 0, k);
}
template <int bins>
[[gnu::always_inline]] inline void add_squares(Float x, Double (&sums)[bins][square_vectors], int k) {
  Double wide[2];
  widen(x, wide);
  for (int n = 0; n < 2; ++n) {
    const Double sum = square_plus(wide[n], sums[0][k + n]);
    const Double rest = square_minus(wide[n], sum - sums[0][k + n]);
    sums[0][k + n] = sum;
    add_rest(rest, sums, 1, k + n);
  }
}

template <class Numbers, int bins>
bool squares(const void* from, int64_t n, const SquareWindow& window, const SquareLanes& before,
             SquareLanes& after) noexcept {
  using T = typename Numbers::Compute;
  constexpr int64_t step = width<T>, at_once = square_vectors * width<double>;
  Double sums[bins][square_vectors];
  for (int bin = 0; bin < bins; ++bin) memcpy(sums[bin], before.bin[bin], sizeof sums[bin]);
  auto smallest = magnitude_below(Vector<T>{});  // of zero, the largest
  int64_t i = 0;
  for (; i + at_once <= n; i += at_once) {
    for (int64_t k = 0; k < at_once; k += step) {
      const Vector<T> x = Numbers::load(from, i + k, step);
      add_squares(x, sums, static_cast<int>(k / width<double>));
      smallest = smaller(smallest, magnitude_below(x));
    }
  }
  for (int64_t k = 0; i + k < n; k += step) {
    const Vector<T> x = Numbers::load(from, i + k, n - i - k < step ? n - i - k : step);
    add_squares(x, sums, static_cast<int>(k / width<double>));
    smallest = smaller(smallest, magnitude_below(x));
  }
  for (int bin = 0; bin < bins; ++bin) memcpy(after.bin[bin], sums[bin], sizeof sums[bin]);
  bool outside = any_less(smallest, window.least_below);
  for (int k = 0; k < square_vectors; ++k) outside |= any_not_within(sums[0][k], Double{} + window.most);
  return !outside;
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
