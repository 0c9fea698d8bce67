// What a SIMD level offers: the update of contiguous arrays in every format, conversion of gradients and the sum of
// their squares, and the copy that measures the memory's limit. csrc/kernels.cpp is compiled once for each level.
//
// C headers only: an inline C++ function compiled for AVX-512 here could otherwise be the copy that the
// linker keeps for everyone.
#pragma once

#include <stdint.h>

namespace lucid {

enum class Type : int { float32, float64, float16, bfloat16 };

// How a parameter is stored: by itself, or with what its 16 bits lack of the float32 master value.
enum class ParamFormat : int { plain, bfloat16, bfloat16_residual, float16, float16_master };
// How the two moments are: in the compute type; stochastically rounded; as codes with a scale for each block.
enum class MomentFormat : int { plain, bfloat16, eight_bit };

constexpr int param_formats = 5, moment_formats = 3;

// The tensors of a row. `lower` is a residual or a master; the moments are values or codes.
enum Operand : int {
  param,
  grad,
  lower,
  exp_avg,
  exp_avg_sq,
  max_exp_avg_sq,
  exp_avg_scale,  // from here on not of the parameter's shape
  exp_avg_sq_scale,
};
constexpr int shaped_operands = 6, max_operands = 8;

// A sum of squares is made of chunks, and a chunk's of lanes: element i of it is added to lane i % sum_lanes.
constexpr int64_t chunk = 4096;
constexpr int sum_lanes = 32;

constexpr int64_t block = 128;  // elements of a row that share a scale; the last of a row may be shorter

// 64 bits, each of which depends on all of x: the finalizer of splitmix64.
static inline uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The scalars of one group and step count, as src/lucid/engine/scalars.py makes them, rounded once to T.
template <class T>
struct Scalars {
  T weight1, weight2;                 // of the two means: 1 - beta where beta >= 1/2, else beta
  T d, k, s, e;                       // alpha lambda; alpha / (1 - beta1^t); 1 / sqrt(1 - beta2^t); epsilon
  T f;                                // what the gradient is multiplied with: clipping, unscaling and direction
  bool from_average1, from_average2;  // beta >= 1/2
  bool scaled;                        // f is not 1: to multiply costs 3 % in cache
};

// What the elements of a slice were like. Sums of squares by lane of a vector (those that a SIMD level lacks stay
// zero): of the gradient as it came, the update, the parameter after it. `ratio`: the largest |m| / sqrt(w).
template <class T>
struct Observed {
  T gradient[16] = {}, update[16] = {}, param[16] = {};
  T ratio = 0;
};
constexpr int64_t observed_at_once = 4096;  // elements whose squares are summed in T: the error stays below 1e-5

// Elements [first, first + n) of what is here of a parameter, in row-major order (in any order where nothing is drawn
// or encoded).
struct Slice {
  void* at[max_operands];  // of element `first`; scales: of the first block
  int64_t first, n;
  int64_t row;     // elements of a row; 8-bit slices begin and end at ends of blocks
  uint64_t key;    // of the draws of this parameter and step
  int64_t number;  // of element `first` in the whole parameter, by which it draws
  void* observed;  // Observed<T>, or null where nobody observes
};

// With a gradient in the compute type, or in the parameter's own 16 bits.
template <class T>
using UpdateFn = void (*)(const Scalars<T>&, const Slice&) noexcept;

// n elements of a gradient's type to the compute type, each rounded at most once.
template <class T>
using ConvertFn = void (*)(const void* from, T* to, int64_t n) noexcept;

// Adds the squares of n numbers of a gradient's type, in float64, to the lanes of their chunk, the first to lane 0.
using SquaresFn = void (*)(const void* from, int64_t n, double (&sums)[sum_lanes]) noexcept;

struct Kernels {
  UpdateFn<float> f32[param_formats][moment_formats][2][2];  // ... [gradient in the parameter's type][amsgrad]
  UpdateFn<double> f64[2];                                   // [amsgrad]
  ConvertFn<float> to_f32[4];                                // by Type
  ConvertFn<double> to_f64[4];
  SquaresFn squares[4];  // by Type
  // The traffic of an fp32 update and nothing else: reads four arrays of n, writes three of them.
  void (*move)(int64_t n, float* a, const float* b, float* c, float* d) noexcept;
};

}  // namespace lucid
