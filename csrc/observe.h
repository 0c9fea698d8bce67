// Sums over elements, in float64: the squares of a gradient, which make its norm, and what a step that is observed
// tells of itself. Included by csrc/kernels.cpp only, which compiles it for each SIMD level.
#pragma once

#include "formats.h"
#include "kernels.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

// Adds the squares of a vector's elements to as many sums.
[[gnu::always_inline]] inline void add_squares(Double x, Double* sums) { sums[0] += x * x; }
[[gnu::always_inline]] inline void add_squares(Float x, Double* sums) {
  Double wide[2];
  widen(x, wide);
  for (int n = 0; n < 2; ++n) sums[n] += wide[n] * wide[n];
}

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

template <class Numbers>
void squares(const void* from, int64_t n, double (&lanes_of_chunk)[sum_lanes]) noexcept {
  constexpr int64_t step = width<typename Numbers::Compute>;
  Double sums[sum_lanes / width<double>];
  memcpy(sums, lanes_of_chunk, sizeof sums);
  int64_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (int64_t k = 0; k < sum_lanes; k += step) {
      add_squares(Numbers::load(from, i + k, step), sums + k / width<double>);
    }
  }
  for (int64_t k = 0; i + k < n; k += step) {
    const int64_t left = n - i - k;
    add_squares(Numbers::load(from, i + k, left < step ? left : step), sums + k / width<double>);
  }
  memcpy(lanes_of_chunk, sums, sizeof sums);
}

template <class V>
[[gnu::always_inline]] inline void add_squares_to(double* sums, V x) {
  constexpr int64_t n = elements_of<V>() / width<double>;
  Double parts[n];
  for (int64_t k = 0; k < n; ++k) parts[k] = load_whole<Double>(sums + k * width<double>);
  add_squares(x, parts);
  for (int64_t k = 0; k < n; ++k) store_whole(sums + k * width<double>, parts[k]);
}

// The elements of a vector before and after their step; all but the first `count` are none.
template <class V>
[[gnu::always_inline]] inline void observe(Observed& seen, int64_t count, V gradient, V before, V theta, V m, V w) {
  V update = theta - before;
  V ratio = m == V{} ? V{} : absolute(m) / square_root(w);
  if (count < elements_of<V>()) {
    for (int64_t k = count; k < elements_of<V>(); ++k) update[k] = ratio[k] = 0;
  }
  add_squares_to(seen.gradient, gradient);
  add_squares_to(seen.update, update);
  add_squares_to(seen.param, theta);
  if constexpr (sizeof(ratio[0]) == sizeof(float)) {
    store_whole(seen.ratio, maximum(load_whole<V>(seen.ratio), ratio));
  } else {
    const auto shorter = __builtin_convertvector(ratio, HalfFloat);
    store_whole(seen.ratio, maximum(load_whole<HalfFloat>(seen.ratio), shorter));
  }
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
