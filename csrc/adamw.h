// The AdamW rule, once: section 3 of the numerics contract (docs/numerics.md), line by line as in
// src/lucid/engine/reference.py. Included by csrc/kernels.cpp only, which compiles it for each SIMD level.
#pragma once

#include "kernels.h"

namespace lucid::LUCID_LEVEL {
namespace {

// a + (1 - beta) (x - a), or x + beta (a - x) where beta < 1/2: `weight` is 1 - beta, or beta.
template <class T>
inline T mean(T a, T x, T weight, bool from_average) {
  const T base = from_average ? a : x;
  const T other = from_average ? x : a;
  return base + weight * (other - base);
}

// The larger; a NaN wins.
template <class T>
inline T maximum(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

// One step of `n` elements in place. Nothing may overlap but equal elements of one array.
template <class T, bool amsgrad>
void adamw(const Scalars<T>& scalars, int64_t n, T* __restrict param, const T* __restrict grad, T* __restrict exp_avg,
           T* __restrict exp_avg_sq, T* __restrict max_exp_avg_sq) noexcept {
  const Scalars<T> h = scalars;
  for (int64_t i = 0; i < n; ++i) {
    const T theta = param[i];
    const T g = h.sign * grad[i];
    const T m = mean(exp_avg[i], g, h.weight1, h.from_average1);
    const T v = mean(exp_avg_sq[i], g * g, h.weight2, h.from_average2);
    T w = v;
    if constexpr (amsgrad) {
      w = maximum(max_exp_avg_sq[i], v);
      max_exp_avg_sq[i] = w;
    }
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = theta - (h.d * theta + (h.k * m) / (square_root(w) * h.s + h.e));
  }
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
