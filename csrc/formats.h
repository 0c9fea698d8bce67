// How values are stored in fewer bits, line by line as in src/lucid/engine/codecs.py; docs/formats.md says it for
// users. Included by csrc/kernels.cpp only, which compiles it for each SIMD level.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

constexpr uint32_t infinity = 0x7f800000u;
constexpr uint32_t quiet_nan = 0x7fc00000u;
constexpr uint32_t two = 0x40000000u;  // the bits of 2.0
constexpr uint32_t sign_bit = 0x80000000u;

// Draws

// 32 bits for each element from number `first` on, of which the upper 16 are the draw. Good up to the next multiple
// of 2^32.
class Draws {
 public:
  Draws(uint64_t key, int64_t first) {
    const uint64_t keys = mixed(key + (static_cast<uint64_t>(first) >> 32));
    counter_ = (lane_numbers() + static_cast<uint32_t>(first)) * weyl + static_cast<uint32_t>(keys);
    key_ = static_cast<uint32_t>(keys >> 32);
  }

  [[gnu::always_inline]] Bits next() {
    Bits x = counter_;
    counter_ += static_cast<uint32_t>(lanes) * weyl;
    x = (x ^ (x >> 16)) + key_;
    return x * 0x846ca68bu;
  }

  // How many elements from number `first` on have the same keys.
  static int64_t reach(int64_t first) { return (int64_t{1} << 32) - (first & 0xffffffff); }

 private:
  static constexpr uint32_t weyl = 0x9e3779b9u;
  Bits counter_;
  uint32_t key_;
};

// Sixteen bits

[[gnu::always_inline]] inline Float float_of_bfloat16(Halves x) { return float_of(widened(x) << 16); }

// In integers, since not every level has instructions for it. A subnormal half is normal in float32: its value is its
// significand times 2^-24, which the float32 that begins at 2^-1 counts off.
[[gnu::always_inline]] inline Float float_of_float16(Halves x) {
  const Bits half = widened(x);
  const Bits magnitude = half & 0x7fffu;
  const Bits normal = (magnitude << 13) + 0x38000000u;
  const Bits special = (magnitude << 13) + 0x70000000u;
  const Bits subnormal = bits_of(float_of(magnitude + 0x3f000000u) - 0.5f);
  const Bits finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of(((half & 0x8000u) << 16) | (magnitude >= 0x7c00u ? special : finite));
}

// To the nearest, ties to even; a NaN becomes a quiet one.

[[gnu::always_inline]] inline Bits nearest_bfloat16(Float x) {
  const Bits bits = bits_of(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? all(quiet_nan >> 16) : rounded;
}

[[gnu::always_inline]] inline Bits nearest_float16(Float x) {
  const Bits bits = bits_of(x);
  const Bits magnitude = bits & ~sign_bit;
  const Bits normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits half = magnitude > infinity ? all(0x7e00u) : magnitude >= 0x47800000u ? all(0x7c00u) : finite;
  return half | ((bits >> 16) & 0x8000u);
}

// Stochastically. A finite value stays finite, and with `positive` one above zero stays so.
template <bool positive>
[[gnu::always_inline]] inline Bits drawn_bfloat16(Float x, Bits drawn) {
  const Bits bits = bits_of(x);
  const Bits magnitude = bits & ~sign_bit;
  Bits rounded = smaller(magnitude + (drawn >> 16), all(0x7f7fffffu)) >> 16;
  if constexpr (positive) rounded = magnitude > 0u ? larger(rounded, all(1)) : rounded;
  const Bits special = magnitude > infinity ? all(quiet_nan >> 16) : all(infinity >> 16);
  return (magnitude >= infinity ? special : rounded) | ((bits & sign_bit) >> 16);
}

// How a parameter is loaded and stored. T: what it is computed in.

template <class T>
struct PlainParam {
  using Compute = T;
  [[gnu::always_inline]] static Vector<T> load(const Slice& s, int64_t i, int64_t count) {
    return LUCID_LEVEL::load<Vector<T>>(static_cast<const T*>(s.at[param]) + i, count);
  }
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Vector<T> theta) {
    LUCID_LEVEL::store(static_cast<T*>(s.at[param]) + i, theta, count);
  }
};

inline const uint16_t* halves(const Slice& s, int operand) { return static_cast<const uint16_t*>(s.at[operand]); }
inline uint16_t* halves_to(const Slice& s, int operand) { return static_cast<uint16_t*>(s.at[operand]); }

struct Bfloat16Param {
  using Compute = float;
  [[gnu::always_inline]] static Float load(const Slice& s, int64_t i, int64_t count) {
    return float_of_bfloat16(LUCID_LEVEL::load<Halves>(halves(s, param) + i, count));
  }
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Float theta) {
    LUCID_LEVEL::store(halves_to(s, param) + i, low_halves(nearest_bfloat16(theta)), count);
  }
};

// Both halves of a float32: the upper one rounded to the nearest, ties away from zero. Where they make no number,
// someone has overwritten the parameter, and it counts alone.
struct Bfloat16ResidualParam {
  using Compute = float;
  [[gnu::always_inline]] static Float load(const Slice& s, int64_t i, int64_t count) {
    const Bits alone = widened(LUCID_LEVEL::load<Halves>(halves(s, param) + i, count)) << 16;
    const Bits residual = widened_signed(LUCID_LEVEL::load<Halves>(halves(s, lower) + i, count));
    const Float master = float_of(alone + residual);
    return master != master ? float_of(alone) : master;
  }
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Float theta) {
    const Bits bits = theta != theta ? all(quiet_nan) : bits_of(theta);
    LUCID_LEVEL::store(halves_to(s, param) + i, low_halves((bits + 0x8000u) >> 16), count);
    LUCID_LEVEL::store(halves_to(s, lower) + i, low_halves(bits), count);
  }
};

struct Float16Param {
  using Compute = float;
  [[gnu::always_inline]] static Float load(const Slice& s, int64_t i, int64_t count) {
    return float_of_float16(LUCID_LEVEL::load<Halves>(halves(s, param) + i, count));
  }
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Float theta) {
    LUCID_LEVEL::store(halves_to(s, param) + i, low_halves(nearest_float16(theta)), count);
  }
};

// Where the master does not round to the parameter, someone has overwritten it, and it counts.
struct Float16MasterParam {
  using Compute = float;
  [[gnu::always_inline]] static Float load(const Slice& s, int64_t i, int64_t count) {
    const Halves half = LUCID_LEVEL::load<Halves>(halves(s, param) + i, count);
    const Float alone = float_of_float16(half);
    const Float master = LUCID_LEVEL::load<Float>(static_cast<const float*>(s.at[lower]) + i, count);
    const auto same = (nearest_float16(master) == widened(half)) | ((master != master) & (alone != alone));
    return same ? master : alone;
  }
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Float theta) {
    LUCID_LEVEL::store(static_cast<float*>(s.at[lower]) + i, theta, count);
    Float16Param::store(s, i, count, theta);
  }
};

// How a gradient is loaded.

template <class T>
struct PlainGradient {
  [[gnu::always_inline]] static Vector<T> load(const Slice& s, int64_t i, int64_t count) {
    return LUCID_LEVEL::load<Vector<T>>(static_cast<const T*>(s.at[grad]) + i, count);
  }
};

template <Float float_of_half(Halves)>
struct HalfGradient {
  [[gnu::always_inline]] static Float load(const Slice& s, int64_t i, int64_t count) {
    return float_of_half(LUCID_LEVEL::load<Halves>(halves(s, grad) + i, count));
  }
};

// How moments are loaded and stored that are no codes.

template <class T>
struct PlainMoments {
  static constexpr bool draws = false;
  template <int operand>
  [[gnu::always_inline]] static Vector<T> load(const Slice& s, int64_t i, int64_t count) {
    return LUCID_LEVEL::load<Vector<T>>(static_cast<const T*>(s.at[operand]) + i, count);
  }
  template <int operand>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Vector<T> x, Bits) {
    LUCID_LEVEL::store(static_cast<T*>(s.at[operand]) + i, x, count);
  }
};

struct Bfloat16Moments {
  static constexpr bool draws = true;
  template <int operand>
  [[gnu::always_inline]] static Float load(const Slice& s, int64_t i, int64_t count) {
    return float_of_bfloat16(LUCID_LEVEL::load<Halves>(halves(s, operand) + i, count));
  }
  template <int operand>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, Float x, Bits drawn) {
    LUCID_LEVEL::store(halves_to(s, operand) + i, low_halves(drawn_bfloat16<operand == exp_avg_sq>(x, drawn)), count);
  }
};

// Eight bits: of a float32 z the lowest three or four bits of its exponent and the upper four of its mantissa, and for
// exp_avg the sign. z less an offset is the value, in units of the block's scale.

constexpr int code_shift = 19;
constexpr float signed_largest = 494.0f;          // z from 2 to 496
constexpr float unsigned_offset = 1.9375f;        // so that the lowest code is above zero
constexpr float unsigned_largest = 126974.0625f;  // z from 2 to 126976
constexpr float least_scale = 0x1p-126f;

[[gnu::always_inline]] inline Float decoded_signed(Bytes code, float scale) {
  const Bits bits = widened_signed(code) << code_shift;  // the sign where it belongs, and in the bits below it
  const Float z = float_of((bits & 0x03f80000u) | two);
  return (z - 2.0f) * float_of(bits_of(Float{} + scale) ^ (bits & sign_bit));
}

[[gnu::always_inline]] inline Float decoded_unsigned(Bytes code, float scale) {
  return (float_of((widened(code) << code_shift) | two) - unsigned_offset) * scale;
}

// What is added to the bits of z below a code before they are cut off: 16 random ones and a half of what they leave,
// so that a value that is some code's own is that code whatever is drawn.
[[gnu::always_inline]] inline Bits below_code(Bits drawn) { return ((drawn >> 13) & 0x7fff8u) | 4u; }

[[gnu::always_inline]] inline Bytes encoded_signed(Float x, float inverse, Bits below) {
  const Bits sign = bits_of(x) & sign_bit;
  const Bits z = bits_of(x * inverse + float_of(sign | two)) + below;
  return low_bytes(((z >> code_shift) & 0x7fu) | ((z >> 24) & 0x80u));
}

[[gnu::always_inline]] inline Bytes encoded_unsigned(Float x, float inverse, Bits below) {
  const Float z = x * inverse + unsigned_offset;
  return low_bytes((bits_of(z > 2.0f ? z : Float{} + 2.0f) + below) >> code_shift);
}

// The scale of a block whose largest magnitude has the bits `most`, NaN where it is not finite, and its inverse, or 0.
struct Scale {
  float scale, inverse;
};

inline Scale scale_of(uint32_t most, float largest_code) {
  if (most == 0) return {0.0f, 0.0f};
  float scale;
  memcpy(&scale, most < infinity ? &most : &quiet_nan, sizeof scale);
  if (most >= infinity) return {scale, 0.0f};
  scale /= largest_code;
  scale = scale < least_scale ? least_scale : scale;
  return {scale, 1.0f / scale};
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
