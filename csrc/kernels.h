// What each SIMD level provides: the update of contiguous arrays in every format, conversion of gradients, sums of
// their squares, and the loop that measures memory bandwidth. csrc/kernels.cpp is compiled once for each level.
//
// It includes C headers only. Otherwise the linker could keep the AVX-512 copy of an inline C++ function for all
// levels.
#pragma once

#include <stdint.h>

namespace lucid {

enum class Type : int { float32, float64, float16, bfloat16 };

// How a parameter is stored: alone, or with a residual or master that completes the float32 master weight; or alone and
// stochastically rounded.
enum class ParamFormat : int { plain, bfloat16, bfloat16_residual, float16, float16_master, bfloat16_drawn };
// How the two moments are stored: in the compute type; stochastically rounded to bfloat16; as codes with a scale for
// each block.
enum class MomentFormat : int { plain, bfloat16, eight_bit };

constexpr int param_formats = 6, moment_formats = 3;

// The tensors of a row. `low_bits` is a residual or a float32 master; the moments are values or codes; `ema` is the
// average of the weights.
enum Operand : int {
  param,
  grad,
  low_bits,
  exp_avg,
  exp_avg_sq,
  max_exp_avg_sq,
  ema,
  exp_avg_scale,  // this and the next do not have the parameter's shape
  exp_avg_sq_scale,
};
constexpr int shaped_operands = 7, max_operands = 9;

// What random bits are for: the key of each use is the step's key XOR the use << 62.
enum class Use : int { moments, param, ema };
constexpr uint64_t key_of(uint64_t key, Use use) { return key ^ (static_cast<uint64_t>(use) << 62); }

constexpr int64_t block = 128;  // elements of a row that share a scale; the last block of a row may be shorter

// 64 bits, each of which depends on all bits of x: the finalizer of splitmix64.
static inline uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The scalars of one group and step count, as src/lucid/engine/scalars.py makes them, rounded once to T.
template <class T>
struct Scalars {
  T weight1, weight2;                 // of the two running averages: 1 - beta if beta >= 1/2, else beta
  T d, k, s, e;                       // alpha lambda; alpha / (1 - beta1^t); 1 / sqrt(1 - beta2^t); epsilon
  T f;                                // the factor for the gradient: clipping, unscaling and direction
  T ema_weight;                       // of the average of the weights, in the same way
  bool from_average1, from_average2;  // beta >= 1/2
  bool scaled;                        // f is not 1; the multiplication costs 3 % in cache
  bool cautious;                      // the decay applies only where it agrees with the update
  bool ema_from_average;
};

// The observation of a slice. Sums of squares by lane of a vector (lanes that a SIMD level does not have stay zero): of
// the gradient before unscaling and clipping, the update, the new parameter. `ratio`: the largest |m| / sqrt(w).
template <class T>
struct Observed {
  T gradient[16] = {}, update[16] = {}, param[16] = {};
  T ratio = 0;
};
constexpr int64_t observed_at_once = 4096;  // elements whose squares are summed in T: the error stays below 1e-5

// Elements [first, first + n) of a local parameter: in row-major order if something is stochastically rounded, else in
// any order.
struct Slice {
  void* at[max_operands];  // of element `first`; scales: of the first block
  int64_t first, n;
  int64_t row;     // elements of a row; 8-bit slices begin and end between blocks
  uint64_t key;    // of the random bits of this parameter and step, for the moments
  int64_t number;  // of element `first` in the whole parameter; random bits depend on it
  bool drawn;      // a bfloat16 parameter is stochastically rounded
  void* observed;  // Observed<T>, or null if the step is not observed
};

// Updates a slice. The gradient is in the compute type, or in the parameter's 16-bit type.
template <class T>
using UpdateFn = void (*)(const Scalars<T>&, const Slice&) noexcept;

// Averages the weights of a slice, as they are stored after its update.
template <class T>
using AverageFn = void (*)(const Scalars<T>&, const Slice&) noexcept;

// Converts n elements from a gradient's type to the compute type, each rounded at most once.
template <class T>
using ConvertFn = void (*)(const void* from, T* to, int64_t n) noexcept;

// Lanes in which squares are added, and the window in which they must lie: csrc/exact_sum.h describes both.
constexpr int max_square_lanes = 32;
struct SquareLanes {
  alignas(64) double bin[3][max_square_lanes];
};
struct SquareWindow {
  double most;          // that a lane may hold in its first bin
  int64_t least_below;  // the least |g| but 0, as an integer in the compute type, less 1
};

// Adds the squares of n numbers of a gradient's type to lanes; returns whether all were inside the window. Element i is
// added to lane i % Kernels::square_lanes.
using SquaresFn = bool (*)(const void* from, int64_t n, const SquareWindow& window, const SquareLanes& before,
                           SquareLanes& after) noexcept;

struct Kernels {
  UpdateFn<float> f32[param_formats][moment_formats][2][2];  // ... [gradient in the parameter's type][amsgrad]
  UpdateFn<double> f64[2];                                   // [amsgrad]
  UpdateFn<float> f32_averaged;  // of plain parameters and moments, without amsgrad: averages the weights, too
  AverageFn<float> average_f32[param_formats];
  AverageFn<double> average_f64;
  ConvertFn<float> to_f32[4];  // by Type
  ConvertFn<double> to_f64[4];
  SquaresFn squares[2][4];  // by the number of bins - 2, and Type
  int square_lanes;
  // The memory traffic of an fp32 update: reads four arrays of n elements, writes three of them.
  void (*move)(int64_t n, float* a, const float* b, float* c, float* d) noexcept;
};

}  // namespace lucid
