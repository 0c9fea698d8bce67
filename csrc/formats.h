// How values are stored in fewer bits, the same as src/lucid/engine/codecs.py line by line; docs/formats.md describes
// the formats for users. Only csrc/kernels.cpp includes it, which compiles it for each SIMD level.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

constexpr uint32_t infinity = 0x7f800000u;
constexpr uint32_t quiet_nan = 0x7fc00000u;
constexpr uint32_t two = 0x40000000u;  // the bits of 2.0
constexpr uint32_t sign_bit = 0x80000000u;

// Random bits

// 32 bits for each element from number `first` on: its number times an odd key plus another key. The upper 16 are used
// as random bits. The keys are valid up to the next multiple of 2^32.
class Draws {
 public:
  Draws(uint64_t key, int64_t first) {
    const uint64_t keys = mixed(key + (static_cast<uint64_t>(first) >> 32));
    factor_ = static_cast<uint32_t>(keys) | 1u;
    bits_ = lane_numbers() * factor_ + (static_cast<uint32_t>(first) * factor_ + static_cast<uint32_t>(keys >> 32));
  }

  template <int N>
  [[gnu::always_inline]] void next(Bits (&drawn)[N]) {
    for (int n = 0; n < N; ++n) {
      drawn[n] = bits_;
      bits_ += static_cast<uint32_t>(lanes) * factor_;
    }
  }

  // The number of elements from number `first` on that have the same keys.
  static int64_t reach(int64_t first) { return (int64_t{1} << 32) - (first & 0xffffffff); }

 private:
  Bits bits_;
  uint32_t factor_;
};

// A random number between -1/2 and 1/2 units of the last place of x. Added to a small change of x, it makes the sum's
// rounding stochastic.
[[gnu::always_inline]] inline Float dither(Float x, Bits drawn) {
  const Float exponent = float_of(bits_of(x) & infinity);  // the largest power of two that is not above |x|
  return (float_of_integer(drawn >> 16) - 32767.5f) * 0x1p-39f * exponent;
}

// Sixteen bits

// All functions below process N vectors at once: two if there are enough elements, because two pack best; or one, of
// which only `count` elements exist.

// N vectors of 16-bit integers as the upper halves of Bits.
template <int N>
[[gnu::always_inline]] inline void load_upper(const uint16_t* from, int64_t count, Bits (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = widened(load<Halves>(from, count)) << 16;
  } else {
    const Words words = load_whole<Words>(from);
    for (int n = 0; n < N; ++n) x[n] = interleaved(words, Words{}, n * lanes);
  }
}

// The upper halves of N vectors of Bits.
template <int N>
[[gnu::always_inline]] inline void store_upper(uint16_t* to, int64_t count, const Bits (&x)[N]) {
  if constexpr (N == 1) {
    store(to, low_halves(x[0] >> 16), count);
  } else {
    store_whole(to, high_halves(x[0], x[1]));
  }
}

template <int N>
[[gnu::always_inline]] inline void store_low_bits(uint16_t* to, int64_t count, const Bits (&x)[N]) {
  if constexpr (N == 1) {
    store(to, low_halves(x[0]), count);
  } else {
    store_whole(to, low_halves(x[0], x[1]));
  }
}

template <int N, class V, class T>
[[gnu::always_inline]] inline void load_vectors(const T* from, int64_t count, V (&x)[N]) {
  for (int n = 0; n < N; ++n) x[n] = load<V>(from + n * width<T>, N == 1 ? count : width<T>);
}

template <int N, class V, class T>
[[gnu::always_inline]] inline void store_vectors(T* to, int64_t count, const V (&x)[N]) {
  for (int n = 0; n < N; ++n) store(to + n * width<T>, x[n], N == 1 ? count : width<T>);
}

// Loads N vectors of 16-bit numbers exactly. Stores them rounded to nearest, ties to even; a NaN becomes a quiet NaN.

struct Bfloat16 {
  template <int N>
  [[gnu::always_inline]] static void load(const uint16_t* from, int64_t count, Float (&x)[N]) {
    Bits upper[N];
    load_upper(from, count, upper);
    for (int n = 0; n < N; ++n) x[n] = float_of(upper[n]);
  }
  template <int N>
  [[gnu::always_inline]] static void store(uint16_t* to, int64_t count, const Float (&x)[N]) {
    Bits upper[N];
    for (int n = 0; n < N; ++n) {
      const Bits bits = bits_of(x[n]);
      upper[n] = x[n] != x[n] ? all(quiet_nan) : bits + 0x7fffu + ((bits >> 16) & 1u);
    }
    store_upper(to, count, upper);
  }
};

struct Float16 {
  template <int N>
  [[gnu::always_inline]] static void load(const uint16_t* from, int64_t count, Float (&x)[N]) {
    for (int n = 0; n < N; ++n) {
      x[n] = float_of_half(LUCID_LEVEL::load<Halves>(from + n * lanes, N == 1 ? count : lanes));
    }
  }
  template <int N>
  [[gnu::always_inline]] static void store(uint16_t* to, int64_t count, const Float (&x)[N]) {
    for (int n = 0; n < N; ++n) {
      LUCID_LEVEL::store(to + n * lanes, half_of_float(x[n]), N == 1 ? count : lanes);
    }
  }
};

// Rounds stochastically. Finite values stay finite; with `positive`, values above zero stay above zero.
template <bool positive>
[[gnu::always_inline]] inline Bits drawn_bfloat16(Float x, Bits drawn) {
  const Bits bits = bits_of(x);
  const Bits magnitude = bits & ~sign_bit;
  Bits rounded = smaller(magnitude + (drawn >> 16), all(0x7f7fffffu));
  if constexpr (positive) rounded = magnitude > 0u ? larger(rounded, all(0x10000)) : rounded;
  const Bits special = magnitude > infinity ? all(quiet_nan) : all(infinity);
  return (magnitude >= infinity ? special : rounded) | (bits & sign_bit);
}

inline const uint16_t* halves(const Slice& s, int operand, int64_t i) {
  return static_cast<const uint16_t*>(s.at[operand]) + i;
}
inline uint16_t* halves_to(const Slice& s, int operand, int64_t i) { return static_cast<uint16_t*>(s.at[operand]) + i; }

// How a parameter is loaded and stored. Compute: the type in which it is computed. draws: it may be stochastically
// rounded.

template <class T>
struct PlainParam {
  using Compute = T;
  static constexpr bool draws = false;
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Vector<T> (&theta)[N]) {
    load_vectors(static_cast<const T*>(s.at[param]) + i, count, theta);
  }
  template <int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Vector<T> (&theta)[N],
                                           Draws&) {
    store_vectors(static_cast<T*>(s.at[param]) + i, count, theta);
  }
};

struct Bfloat16Param {
  using Compute = float;
  static constexpr bool draws = true;
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Float (&theta)[N]) {
    Bfloat16::load(halves(s, param, i), count, theta);
  }
  template <int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Float (&theta)[N],
                                           Draws& draws) {
    if (!s.drawn) return Bfloat16::store(halves_to(s, param, i), count, theta);
    Bits drawn[N];
    draws.next(drawn);
    for (int n = 0; n < N; ++n) drawn[n] = drawn_bfloat16<false>(theta[n], drawn[n]);
    store_upper(halves_to(s, param, i), count, drawn);
  }
};

struct Float16Param {
  using Compute = float;
  static constexpr bool draws = false;
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Float (&theta)[N]) {
    Float16::load(halves(s, param, i), count, theta);
  }
  template <int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Float (&theta)[N], Draws&) {
    Float16::store(halves_to(s, param, i), count, theta);
  }
};

// A bfloat16 parameter and its residual are the two halves of a float32; the upper half is rounded to nearest, ties
// away from zero. If they combine to NaN, somebody has overwritten the parameter, and its own value is used.
struct Bfloat16ResidualParam {
  using Compute = float;
  static constexpr bool draws = false;
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Float (&theta)[N]) {
    Bits alone[N], both[N];
    if constexpr (N == 1) {
      load_upper(halves(s, param, i), count, alone);
      both[0] = alone[0] + widened_signed(LUCID_LEVEL::load<Halves>(halves(s, low_bits, i), count));
    } else {
      const Words upper = load_whole<Words>(halves(s, param, i));
      const Words residual = load_whole<Words>(halves(s, low_bits, i));
      for (int n = 0; n < N; ++n) {
        const Bits bits = interleaved(upper, residual, n * lanes);
        alone[n] = bits & 0xffff0000u;
        both[n] = (bits ^ 0x8000u) - 0x8000u;  // adds the residual as a signed number
      }
    }
    for (int n = 0; n < N; ++n) {
      const Float master = float_of(both[n]);
      theta[n] = master != master ? float_of(alone[n]) : master;
    }
  }
  template <int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Float (&theta)[N], Draws&) {
    Bits bits[N], upper[N];
    for (int n = 0; n < N; ++n) {
      bits[n] = theta[n] != theta[n] ? all(quiet_nan) : bits_of(theta[n]);
      upper[n] = bits[n] + 0x8000u;
    }
    store_upper(halves_to(s, param, i), count, upper);
    store_low_bits(halves_to(s, low_bits, i), count, bits);
  }
};

// If the master does not round to the parameter, somebody has overwritten the parameter, and its own value is used.
struct Float16MasterParam {
  using Compute = float;
  static constexpr bool draws = false;
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Float (&theta)[N]) {
    load_vectors(static_cast<const float*>(s.at[low_bits]) + i, count, theta);
    for (int n = 0; n < N; ++n) {
      const Halves half = LUCID_LEVEL::load<Halves>(halves(s, param, i + n * lanes), N == 1 ? count : lanes);
      const Float alone = float_of_half(half);
      const Bits rounded = widened(half_of_float(theta[n]));
      const auto same = (rounded == widened(half)) | ((theta[n] != theta[n]) & (alone != alone));
      theta[n] = same ? theta[n] : alone;
    }
  }
  template <int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Float (&theta)[N], Draws&) {
    store_vectors(static_cast<float*>(s.at[low_bits]) + i, count, theta);
    Float16::store(halves_to(s, param, i), count, theta);
  }
};

// How a gradient is loaded.

template <class T>
struct PlainGradient {
  static constexpr int64_t bytes = sizeof(T);
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Vector<T> (&gradient)[N]) {
    load_vectors(static_cast<const T*>(s.at[grad]) + i, count, gradient);
  }
};

template <class Half>
struct HalfGradient {
  static constexpr int64_t bytes = 2;
  template <int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Float (&gradient)[N]) {
    Half::load(halves(s, grad, i), count, gradient);
  }
};

// How moments that are not codes are loaded and stored.

template <class T>
struct PlainMoments {
  static constexpr bool draws = false;
  template <int operand, int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Vector<T> (&x)[N]) {
    load_vectors(static_cast<const T*>(s.at[operand]) + i, count, x);
  }
  template <int operand, int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Vector<T> (&x)[N],
                                           const Bits (&)[N]) {
    store_vectors(static_cast<T*>(s.at[operand]) + i, count, x);
  }
};

struct Bfloat16Moments {
  static constexpr bool draws = true;
  template <int operand, int N>
  [[gnu::always_inline]] static void load(const Slice& s, int64_t i, int64_t count, Float (&x)[N]) {
    Bfloat16::load(halves(s, operand, i), count, x);
  }
  template <int operand, int N>
  [[gnu::always_inline]] static void store(const Slice& s, int64_t i, int64_t count, const Float (&x)[N],
                                           const Bits (&drawn)[N]) {
    Bits upper[N];
    for (int n = 0; n < N; ++n) upper[n] = drawn_bfloat16<operand == exp_avg_sq>(x[n], drawn[n]);
    store_upper(halves_to(s, operand, i), count, upper);
  }
};

// Eight bits. A code is the lowest three (signed) or four (unsigned) exponent bits of a float32 z, the upper four bits
// of its mantissa, and for exp_avg the sign. The value is z minus an offset, in units of the block's scale.

constexpr int code_shift = 19;
constexpr float signed_largest = 494.0f;          // z from 2 to 496
constexpr float unsigned_offset = 1.9375f;        // the lowest code decodes to a value above zero
constexpr float unsigned_largest = 126974.0625f;  // z from 2 to 126976
constexpr float least_scale = 0x1p-126f;

// All functions below process four vectors at once, because four pack best; or one, of which only `count` elements
// exist.

template <int N>
[[gnu::always_inline]] inline void decode_signed(const uint8_t* from, int64_t count, float scale, Float (&x)[N]) {
  for (int n = 0; n < N; ++n) {
    const Bytes code = load<Bytes>(from + n * lanes, N == 1 ? count : lanes);
    const Bits bits = widened_signed(code) << code_shift;  // the sign is at its place, and copied to the bits below
    const Float z = float_of((bits & 0x03f80000u) | two);
    x[n] = (z - 2.0f) * float_of(bits_of(Float{} + scale) ^ (bits & sign_bit));
  }
}

template <int N>
[[gnu::always_inline]] inline void decode_unsigned(const uint8_t* from, int64_t count, float scale, Float (&x)[N]) {
  Bits z[N];
  if constexpr (N == 1) {
    z[0] = (widened(load<Bytes>(from, count)) << code_shift) | two;
  } else {
    upper_halves<code_shift - 16>(load_whole<PackedBytes>(from), two >> (code_shift + 8), z);
  }
  for (int n = 0; n < N; ++n) x[n] = (float_of(z[n]) - unsigned_offset) * scale;
}

// What is added to the bits of z before those below a code are cut off: 16 random bits and half a unit of the last,
// minus the bits of 2. So a value that a code represents exactly keeps that code, whatever the random bits are.
[[gnu::always_inline]] inline Bits below_code(Bits drawn) { return ((drawn >> 13) & 0x7fff8u) | (4u - two); }

template <int N>
[[gnu::always_inline]] inline void encode_signed(uint8_t* to, int64_t count, float inverse, const Float (&x)[N],
                                                 const Bits (&below)[N]) {
  Bits bits[N];
  for (int n = 0; n < N; ++n) {
    bits[n] = bits_of(x[n] * inverse + float_of((bits_of(x[n]) & sign_bit) | two)) + below[n];
  }
  if constexpr (N == 1) {
    store(to, low_bytes(selected(0x7f, bits[0] >> code_shift, bits[0] >> 24)), count);
  } else {
    store_whole(to, signed_bytes_from<code_shift>(bits));
  }
}

template <int N>
[[gnu::always_inline]] inline void encode_unsigned(uint8_t* to, int64_t count, float inverse, const Float (&x)[N],
                                                   const Bits (&below)[N]) {
  Bits bits[N];  // below zero if z is below 2
  for (int n = 0; n < N; ++n) bits[n] = bits_of(x[n] * inverse + unsigned_offset) + below[n];
  if constexpr (N == 1) {
    store(to, low_bytes(bits[0] < sign_bit ? bits[0] >> code_shift : Bits{}), count);
  } else {
    store_whole(to, bytes_from<code_shift>(bits));
  }
}

// The scales of a block's two moments, and the scales' inverses (0 for a scale of 0 or NaN).
struct Scales {
  float scale[4], inverse[4];  // the last two mean nothing
};

// most: the bits of the moments' largest magnitudes. A scale is NaN if that is not finite.
[[gnu::always_inline]] inline Scales scales_of(Few most) {
  FewFloats scale = (FewFloats)most / FewFloats{signed_largest, unsigned_largest, 1.0f, 1.0f};
  scale = scale < least_scale ? FewFloats{} + least_scale : scale;
  scale = most == 0u ? FewFloats{} : scale;
  scale = most >= infinity ? (FewFloats)(Few{} + quiet_nan) : scale;
  const FewFloats inverse = scale > 0.0f ? 1.0f / scale : FewFloats{};
  Scales scales;
  store_whole(scales.scale, scale);
  store_whole(scales.inverse, inverse);
  return scales;
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
