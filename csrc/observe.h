// Sums over elements: the squares of a gradient, in float64, for its norm, and the observations of a step. Only
// csrc/kernels.cpp includes it, which compiles it for each SIMD level.
#pragma once

#include "adamw.h"
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
constexpr T largest_finite =
    sizeof(T) == sizeof(float) ? static_cast<T>(0x1.fffffep127) : static_cast<T>(0x1.fffffffffffffp1023);

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

// Adds the step of N vectors to the observation of their slice. If N is 1, only `count` elements exist.
template <int N, class T>
[[gnu::always_inline]] inline void observe(Observed<T>& seen, int64_t count, const Vector<T> (&theta)[N],
                                           const Vector<T> (&g)[N], const Vector<T> (&m)[N],
                                           Used<Vector<T>> (&used)[N]) {
  using V = Vector<T>;
  V gradient = {}, update = {}, param = {};
  for (int n = 0; n < N; ++n) {
    V after = theta[n];
    if (N == 1 && count < width<T>) {  // elements that do not exist may be 0 / 0
      for (int64_t k = count; k < width<T>; ++k) used[n].update[k] = after[k] = 0;
    }
    gradient += g[n] * g[n];
    update += used[n].update * used[n].update;
    param += after * after;
    // Divide only if the ratio gets larger, or something is NaN: a NaN wins, and infinity / infinity is one.
    const V bound = seen.ratio * used[n].root;
    if (any_not_within(absolute(m[n]), bound > largest_finite<T> ? V{} + largest_finite<T> : bound)) {
      for (int64_t k = 0; k < width<T>; ++k) {
        const T size = absolute(m[n])[k];
        const T ratio = size == 0 ? 0 : size / used[n].root[k];
        if (ratio > seen.ratio || ratio != ratio) seen.ratio = ratio;
      }
    }
  }
  store_whole(seen.gradient, load_whole<V>(seen.gradient) + gradient);
  store_whole(seen.update, load_whole<V>(seen.update) + update);
  store_whole(seen.param, load_whole<V>(seen.param) + param);
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
