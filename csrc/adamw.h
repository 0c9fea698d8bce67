// The AdamW rule: section 3 of the numerics contract (docs/numerics.md), the same as src/lucid/engine/reference.py line
// by line. Only csrc/kernels.cpp includes it, which compiles it for each SIMD level.
#pragma once

#include "formats.h"
#include "kernels.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

// a + (1 - beta) (x - a), or x + beta (a - x) if beta < 1/2; `weight` is 1 - beta, or beta.
template <class V, class T>
[[gnu::always_inline]] inline V mean(V a, V x, T weight, bool from_average) {
  const V base = from_average ? a : x;
  const V other = from_average ? x : a;
  return base + weight * (other - base);
}

// The larger of a and b, or NaN if one is NaN.
template <class V>
inline V maximum(V a, V b) {
  return ((b > a) | (b != b)) ? b : a;
}

// The intermediate values of a step that observing needs.
template <class V>
struct Used {
  V root, update;
};

// The two running averages of a vector of elements.
template <class V, class T>
[[gnu::always_inline]] inline void average(const Scalars<T>& h, V gradient, V& m, V& v) {
  const V g = h.scaled ? h.f * gradient : gradient;
  m = mean(m, g, h.weight1, h.from_average1);
  v = mean(v, g * g, h.weight2, h.from_average2);
}

// One step of a vector of elements. With `averaged`, m and v are the new averages already.
template <bool amsgrad, bool averaged, class V, class T>
[[gnu::always_inline]] inline Used<V> adamw(const Scalars<T>& h, V& theta, V gradient, V& m, V& v, V& w) {
  if constexpr (!averaged) average(h, gradient, m, v);
  w = amsgrad ? maximum(w, v) : v;
  const V root = square_root(w);
  const V update = (h.k * m) / (root * h.s + h.e);
  V decay = h.d * theta;
  if (h.cautious) decay = ((update > 0) & (theta > 0)) | ((update < 0) & (theta < 0)) ? decay : V{};
  const V change = decay + update;
  theta = theta - change;
  return {root, change};
}

// The next average of the weights. In float32 it is stochastically rounded.
template <class V, class T>
[[gnu::always_inline]] inline V average_of_weights(const Scalars<T>& h, V a, V theta, Bits drawn) {
  if (!h.ema_from_average) return theta + h.ema_weight * (a - theta);
  V change = h.ema_weight * (theta - a);
  if constexpr (sizeof(T) == sizeof(float)) change = change + dither(a, drawn);
  return a + change;
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
