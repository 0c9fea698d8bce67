// What a SIMD level offers: the update on contiguous arrays, conversion of gradients, and the copy that
// measures the memory's limit. csrc/kernels.cpp is compiled once for each level.
//
// C headers only: an inline C++ function compiled for AVX-512 here could otherwise be the copy that the
// linker keeps for everyone.
#pragma once

#include <stdint.h>

namespace lucid {

enum class Type : int { float32, float64, float16, bfloat16 };

// The scalars of one group and step count, as src/lucid/engine/scalars.py makes them, rounded once to T.
template <class T>
struct Scalars {
  T weight1, weight2;                 // of the two means: 1 - beta where beta >= 1/2, else beta
  T d, k, s, e;                       // alpha lambda; alpha / (1 - beta1^t); 1 / sqrt(1 - beta2^t); epsilon
  T sign;                             // 1, or -1 to maximize: g times it is exact
  bool from_average1, from_average2;  // beta >= 1/2
};

template <class T>
using UpdateFn = void (*)(const Scalars<T>&, int64_t n, T* param, const T* grad, T* exp_avg, T* exp_avg_sq,
                          T* max_exp_avg_sq) noexcept;

// n elements of a gradient's type to the compute type, each rounded at most once.
template <class T>
using ConvertFn = void (*)(const void* from, T* to, int64_t n) noexcept;

template <class T>
struct TypedKernels {
  UpdateFn<T> update[2];    // without and with amsgrad
  ConvertFn<T> convert[4];  // by Type
};

struct Kernels {
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  // The traffic of an fp32 update and nothing else: reads four arrays of n, writes three of them.
  void (*move)(int64_t n, float* a, const float* b, float* c, float* d) noexcept;

  template <class T>
  const TypedKernels<T>& typed() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

}  // namespace lucid
