// The observations of a step: sums over elements. Only csrc/kernels.cpp includes it, which compiles it for each SIMD
// level.
#pragma once

#include "adamw.h"
#include "kernels.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

template <class T>
constexpr T largest_finite =
    sizeof(T) == sizeof(float) ? static_cast<T>(0x1.fffffep127) : static_cast<T>(0x1.fffffffffffffp1023);

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
