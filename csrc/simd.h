// Vectors of the SIMD level that a file is compiled for. They are GNU vector extensions with the operators of numbers.
// This file adds what the extensions lack, and what GCC 12 compiles to code for one element at a time.
//
// It includes C headers only: see kernels.h.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace lucid::LUCID_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int lanes = vector_bytes / 4;

using Float = float __attribute__((vector_size(vector_bytes)));
using Double = double __attribute__((vector_size(vector_bytes)));
using Bits = uint32_t __attribute__((vector_size(vector_bytes)));
using Signed = int32_t __attribute__((vector_size(vector_bytes)));
using SignedWide = int64_t __attribute__((vector_size(vector_bytes)));
// As many 16-bit and 8-bit integers as Bits has lanes, as they are in memory.
using Halves = uint16_t __attribute__((vector_size(2 * lanes)));
using Bytes = uint8_t __attribute__((vector_size(lanes)));

// The 16-bit integers of two vectors and the 8-bit integers of four: packing two or four at once is cheapest.
using Words = uint16_t __attribute__((vector_size(vector_bytes)));
using PackedBytes = uint8_t __attribute__((vector_size(vector_bytes)));

// A few numbers, as many at every level.
using Few = uint32_t __attribute__((vector_size(16)));
using FewFloats = float __attribute__((vector_size(16)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = Float;
};
template <>
struct VectorOf<double> {
  using Type = Double;
};
// The vector that computes in T, with `width<T>` elements.
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int64_t width = vector_bytes / static_cast<int64_t>(sizeof(T));

inline Bits bits_of(Float x) { return (Bits)x; }
inline Float float_of(Bits x) { return (Float)x; }
inline Bits all(uint32_t x) { return Bits{} + x; }
inline Float float_of_integer(Bits x) { return __builtin_convertvector((Signed)x, Float); }  // x < 2^31

template <class V>
constexpr int64_t elements_of() {
  return sizeof(V) / sizeof(V{}[0]);
}

#if defined(__AVX512F__)
inline Float load_first(const float* from, int64_t count, Float) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
inline Double load_first(const double* from, int64_t count, Double) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
inline Halves load_first(const uint16_t* from, int64_t count, Halves) {
  return (Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
}
inline Bytes load_first(const uint8_t* from, int64_t count, Bytes) {
  return (Bytes)_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
}
inline void store_first(float* to, Float x, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
}
inline void store_first(double* to, Double x, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), x);
}
inline void store_first(uint16_t* to, Halves x, int64_t count) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), (__m256i)x);
}
inline void store_first(uint8_t* to, Bytes x, int64_t count) {
  _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), (__m128i)x);
}
#else
template <class T, class V>
inline V load_first(const T* from, int64_t count, V x) {
  for (int64_t k = 0; k < count; ++k) x[k] = from[k];
  return x;
}
template <class T, class V>
inline void store_first(T* to, V x, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = x[k];
}
#endif

template <class V>
[[gnu::always_inline]] inline V load_whole(const void* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
[[gnu::always_inline]] inline void store_whole(void* to, V x) {
  memcpy(to, &x, sizeof x);
}

// Loads the first `count` elements from an address; the others are zero.
template <class V, class T>
[[gnu::always_inline]] inline V load(const T* from, int64_t count) {
  if (count < elements_of<V>()) return load_first(from, count, V{});
  return load_whole<V>(from);
}

template <class V, class T>
[[gnu::always_inline]] inline void store(T* to, V x, int64_t count) {
  if (count < elements_of<V>()) {
    store_first(to, x, count);
  } else {
    store_whole(to, x);
  }
}

// widened(): Bits from shorter integers, zero-extended; widened_signed(): sign-extended. low_bytes(), low_halves():
// shorter integers from the low bits of Bits. largest(): the largest number of a and of b, the first two of the result.

#if defined(__AVX512F__)
inline Float square_root(Float x) { return _mm512_sqrt_ps(x); }
inline Double square_root(Double x) { return _mm512_sqrt_pd(x); }
inline Bits widened(Bytes x) { return (Bits)_mm512_cvtepu8_epi32((__m128i)x); }
inline Bits widened_signed(Bytes x) { return (Bits)_mm512_cvtepi8_epi32((__m128i)x); }
inline Bits widened(Halves x) { return (Bits)_mm512_cvtepu16_epi32((__m256i)x); }
inline Bits widened_signed(Halves x) { return (Bits)_mm512_cvtepi16_epi32((__m256i)x); }
inline Bytes low_bytes(Bits x) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)x); }
inline Halves low_halves(Bits x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }
inline Few largest(Bits a, Bits b) {
  const __m512i x =
      _mm512_max_epu32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b), _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
  const __m256i y = _mm256_max_epu32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  const __m128i z = _mm_max_epu32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  return (Few)_mm_max_epu32(z, _mm_shuffle_epi32(z, 0x4e));
}

// high_halves(), low_halves(): the upper or lower halves of two vectors in order.
inline Words every_second(Bits a, Bits b, uint16_t first) {
  Words numbers;
  for (int k = 0; k < 2 * lanes; ++k) numbers[k] = static_cast<uint16_t>(2 * k + first);
  return (Words)_mm512_permutex2var_epi16((__m512i)a, (__m512i)numbers, (__m512i)b);
}
inline Words high_halves(Bits a, Bits b) { return every_second(a, b, 1); }
inline Words low_halves(Bits a, Bits b) { return every_second(a, b, 0); }
// Bits whose upper halves are words of `upper` from `first` on, and whose lower halves are those of `lower`.
inline Bits interleaved(Words upper, Words lower, int first) {
  Words numbers;
  for (int k = 0; k < lanes; ++k) {
    numbers[2 * k] = static_cast<uint16_t>(first + k);
    numbers[2 * k + 1] = static_cast<uint16_t>(2 * lanes + first + k);
  }
  return (Bits)_mm512_permutex2var_epi16((__m512i)lower, (__m512i)numbers, (__m512i)upper);
}
#elif defined(__AVX2__)
inline __m128i eight(Bytes x) {
  long long raw;
  memcpy(&raw, &x, sizeof raw);
  return _mm_cvtsi64_si128(raw);
}
inline Float square_root(Float x) { return _mm256_sqrt_ps(x); }
inline Double square_root(Double x) { return _mm256_sqrt_pd(x); }
inline Bits widened(Bytes x) { return (Bits)_mm256_cvtepu8_epi32(eight(x)); }
inline Bits widened_signed(Bytes x) { return (Bits)_mm256_cvtepi8_epi32(eight(x)); }
inline Bits widened(Halves x) { return (Bits)_mm256_cvtepu16_epi32((__m128i)x); }
inline Bits widened_signed(Halves x) { return (Bits)_mm256_cvtepi16_epi32((__m128i)x); }
inline Halves low_halves(Bits x) {
  const __m256i low = (__m256i)(x & 0xffffu);
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
inline Bytes low_bytes(Bits x) {
  const __m128i halves = (__m128i)low_halves(x & 0xffu);
  const long long raw = _mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
  Bytes bytes;
  memcpy(&bytes, &raw, sizeof bytes);
  return bytes;
}
inline Words low_halves(Bits a, Bits b) {
  const __m256i both = _mm256_packus_epi32((__m256i)(a & 0xffffu), (__m256i)(b & 0xffffu));
  return (Words)_mm256_permute4x64_epi64(both, 0xd8);
}
inline Words high_halves(Bits a, Bits b) {
  const __m256i both = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
  return (Words)_mm256_permute4x64_epi64(both, 0xd8);
}
inline Bits interleaved(Words upper, Words lower, int first) {
  const __m256i u = _mm256_permute4x64_epi64((__m256i)upper, 0xd8), l = _mm256_permute4x64_epi64((__m256i)lower, 0xd8);
  return (Bits)(first == 0 ? _mm256_unpacklo_epi16(l, u) : _mm256_unpackhi_epi16(l, u));
}
inline Few largest(Bits a, Bits b) {
  const __m256i x =
      _mm256_max_epu32(_mm256_unpacklo_epi32((__m256i)a, (__m256i)b), _mm256_unpackhi_epi32((__m256i)a, (__m256i)b));
  const __m128i y = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return (Few)_mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
}
#elif defined(__x86_64__)
inline Float square_root(Float x) { return _mm_sqrt_ps(x); }
inline Double square_root(Double x) { return _mm_sqrt_pd(x); }
inline Bits widened(Halves x) {
  long long raw;
  memcpy(&raw, &x, sizeof raw);
  return (Bits)_mm_unpacklo_epi16(_mm_cvtsi64_si128(raw), _mm_setzero_si128());
}
inline Bits widened(Bytes x) {
  int raw;
  memcpy(&raw, &x, sizeof raw);
  const __m128i zero = _mm_setzero_si128();
  return (Bits)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(raw), zero), zero);
}
inline Bits widened_signed(Halves x) { return (Bits)_mm_srai_epi32((__m128i)(widened(x) << 16), 16); }
inline Bits widened_signed(Bytes x) { return (Bits)_mm_srai_epi32((__m128i)(widened(x) << 24), 24); }
inline Halves low_halves(Bits x) {
  const __m128i extended = _mm_srai_epi32((__m128i)(x << 16), 16);  // SSE2 can only pack signed integers
  const long long raw = _mm_cvtsi128_si64(_mm_packs_epi32(extended, extended));
  Halves halves;
  memcpy(&halves, &raw, sizeof halves);
  return halves;
}
inline Bytes low_bytes(Bits x) {
  const __m128i low = (__m128i)(x & 0xffu);
  const __m128i halves = _mm_packs_epi32(low, low);
  const int raw = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
  Bytes bytes;
  memcpy(&bytes, &raw, sizeof bytes);
  return bytes;
}
inline Words high_halves(Bits a, Bits b) {
  return (Words)_mm_packs_epi32(_mm_srai_epi32((__m128i)a, 16), _mm_srai_epi32((__m128i)b, 16));
}
inline Words low_halves(Bits a, Bits b) { return high_halves(a << 16, b << 16); }
inline Bits interleaved(Words upper, Words lower, int first) {
  return (Bits)(first == 0 ? _mm_unpacklo_epi16((__m128i)lower, (__m128i)upper)
                           : _mm_unpackhi_epi16((__m128i)lower, (__m128i)upper));
}
inline Few largest(Bits a, Bits b) {
  Few most = {};
  for (int k = 0; k < lanes; ++k) {
    most[0] = a[k] > most[0] ? a[k] : most[0];
    most[1] = b[k] > most[1] ? b[k] : most[1];
  }
  return most;
}
#else
inline Float square_root(Float x) { return (Float)vsqrtq_f32((float32x4_t)x); }
inline Double square_root(Double x) { return (Double)vsqrtq_f64((float64x2_t)x); }
// The four bytes of a word of memory where `to` has their numbers, zeros where it has none.
inline Bits placed(Bytes x, PackedBytes to) {
  uint32_t raw;
  memcpy(&raw, &x, sizeof raw);
  return (Bits)vqtbl1q_u8((uint8x16_t)vdupq_n_u32(raw), (uint8x16_t)to);
}
inline Bits widened(Bytes x) {
  return placed(x, PackedBytes{0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3, 16, 16, 16});
}
inline Bits widened_signed(Bytes x) {
  const Bits highest = placed(x, PackedBytes{16, 16, 16, 0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3});
  return (Bits)vshrq_n_s32((int32x4_t)highest, 24);
}
inline Bits widened(Halves x) { return (Bits)vmovl_u16((uint16x4_t)x); }
inline Bits widened_signed(Halves x) { return (Bits)vmovl_s16((int16x4_t)x); }
inline Halves low_halves(Bits x) { return (Halves)vmovn_u32((uint32x4_t)x); }
inline Bytes low_bytes(Bits x) {
  const uint16x4_t halves = vmovn_u32((uint32x4_t)x);
  const uint32_t raw = vget_lane_u32((uint32x2_t)vmovn_u16(vcombine_u16(halves, halves)), 0);
  Bytes bytes;
  memcpy(&bytes, &raw, sizeof bytes);
  return bytes;
}
inline Words high_halves(Bits a, Bits b) { return (Words)vuzp2q_u16((uint16x8_t)a, (uint16x8_t)b); }
inline Words low_halves(Bits a, Bits b) { return (Words)vuzp1q_u16((uint16x8_t)a, (uint16x8_t)b); }
inline Bits interleaved(Words upper, Words lower, int first) {
  return (Bits)(first == 0 ? vzip1q_u16((uint16x8_t)lower, (uint16x8_t)upper)
                           : vzip2q_u16((uint16x8_t)lower, (uint16x8_t)upper));
}
inline Few largest(Bits a, Bits b) { return Few{vmaxvq_u32((uint32x4_t)a), vmaxvq_u32((uint32x4_t)b)}; }
#endif

// The same numbers in float64, in order.
inline void widen(Float x, Double (&wide)[2]) {
#if defined(__AVX512F__)
  wide[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  wide[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  wide[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  wide[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#elif defined(__x86_64__)
  wide[0] = _mm_cvtps_pd(x);
  wide[1] = _mm_cvtps_pd(_mm_movehl_ps(x, x));
#else
  wide[0] = (Double)vcvt_f64_f32(vget_low_f32((float32x4_t)x));
  wide[1] = (Double)vcvt_high_f64_f32((float32x4_t)x);
#endif
}

// x * x + y and x * x - y, where x * x is exact, so that one rounding or two give the same.
inline Double square_plus(Double x, Double y) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(x, x, y);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(x, x, y);
#elif defined(__x86_64__)
  return x * x + y;
#else
  return (Double)vfmaq_f64((float64x2_t)y, (float64x2_t)x, (float64x2_t)x);
#endif
}
inline Double square_minus(Double x, Double y) {
#if defined(__AVX512F__)
  return _mm512_fmsub_pd(x, x, y);
#elif defined(__AVX2__)
  return _mm256_fmsub_pd(x, x, y);
#else
  return square_plus(x, -y);
#endif
}

// |x| as an integer, less 1; of zero, the largest integer.
inline Signed magnitude_below(Float x) { return (Signed)((bits_of(x) - 1) & 0x7fffffffu); }
inline SignedWide magnitude_below(Double x) {
  using Wide = uint64_t __attribute__((vector_size(vector_bytes)));
  return (SignedWide)(((Wide)x - 1) & 0x7fffffffffffffffu);
}

inline Signed smaller(Signed a, Signed b) { return a < b ? a : b; }
inline SignedWide smaller(SignedWide a, SignedWide b) { return a < b ? a : b; }

// Whether some a < b.
inline bool any_less(Signed a, int64_t b) {
  const Signed bound = Signed{} + static_cast<int32_t>(b);
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)bound) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(a < bound)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)(a < bound)) != 0;
#else
  return vmaxvq_u32((uint32x4_t)(a < bound)) != 0;
#endif
}
inline bool any_less(SignedWide a, int64_t b) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi64_mask((__m512i)a, _mm512_set1_epi64(b)) != 0;
#else
  bool any = false;
  for (int k = 0; k < lanes / 2; ++k) any |= a[k] < b;
  return any;
#endif
}

// Whether some a > b, or a or b is NaN.
inline bool any_not_within(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpnle_ps(a, b)) != 0;
#else
  return vminvq_u32(vcleq_f32((float32x4_t)a, (float32x4_t)b)) == 0;
#endif
}
inline bool any_not_within(Double a, Double b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NLE_UQ)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_pd(_mm_cmpnle_pd(a, b)) != 0;
#else
  return !(a[0] <= b[0]) || !(a[1] <= b[1]);
#endif
}

inline Float absolute(Float x) { return float_of(bits_of(x) & 0x7fffffffu); }
inline Double absolute(Double x) {
  using Wide = uint64_t __attribute__((vector_size(vector_bytes)));
  return (Double)((Wide)x & 0x7fffffffffffffffu);
}

// float16 to float32, and back to the nearest, ties to even.
#if defined(__AVX512F__)
inline Float float_of_half(Halves x) { return _mm512_cvtph_ps((__m256i)x); }
inline Halves half_of_float(Float x) { return (Halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__) && defined(__F16C__)
inline Float float_of_half(Halves x) { return _mm256_cvtph_ps((__m128i)x); }
inline Halves half_of_float(Float x) { return (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
inline Float float_of_half(Halves x) { return (Float)vcvt_f32_f16((float16x4_t)x); }
inline Halves half_of_float(Float x) { return (Halves)vcvt_f16_f32((float32x4_t)x); }
#else
// In integers. A subnormal half is normal in float32: its value is its significand times 2^-24, which the float32 that
// begins at 2^-1 counts off.
inline Float float_of_half(Halves x) {
  const Bits half = widened(x);
  const Bits magnitude = half & 0x7fffu;
  const Bits normal = (magnitude << 13) + 0x38000000u;
  const Bits special = (magnitude << 13) + 0x70000000u;
  const Bits subnormal = bits_of(float_of(magnitude + 0x3f000000u) - 0.5f);
  const Bits finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of(((half & 0x8000u) << 16) | (magnitude >= 0x7c00u ? special : finite));
}
inline Halves half_of_float(Float x) {
  const Bits bits = bits_of(x);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits half = magnitude > 0x7f800000u ? all(0x7e00u) : magnitude >= 0x47800000u ? all(0x7c00u) : finite;
  return low_halves(half | ((bits >> 16) & 0x8000u));
}
#endif

inline Bits larger(Bits a, Bits b) { return a > b ? a : b; }
inline Bits smaller(Bits a, Bits b) { return a < b ? a : b; }

// The bits of `a` where `mask` has ones, and those of `b` elsewhere.
inline Bits selected(uint32_t mask, Bits a, Bits b) { return (a & mask) | (b & ~mask); }
inline Words selected(uint16_t mask, Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_ternarylogic_epi32(_mm512_set1_epi16(static_cast<short>(mask)), (__m512i)a, (__m512i)b, 0xca);
#elif defined(__aarch64__)
  return (Words)vbslq_u16(vdupq_n_u16(mask), (uint16x8_t)a, (uint16x8_t)b);
#else
  return (a & mask) | (b & static_cast<uint16_t>(~mask));
#endif
}

// Bytes and four vectors of Bits

// bytes_from<shift>(): bits `shift` to `shift` + 7 as bytes, zero for negative numbers; the higher bits of the others
// are zero. signed_bytes_from<shift>(): seven bits from `shift` on and the sign; the bits between are zero.
// upper_halves<shift>(): Bits whose upper halves are 16-bit numbers of these bytes, shifted left, and zero below.
#if defined(__AVX512F__)
template <int shift>
inline PackedBytes bytes_from(const Bits (&x)[4]) {
  const __m512i a = _mm512_srai_epi16((__m512i)high_halves(x[0], x[1]), shift - 16);
  const __m512i b = _mm512_srai_epi16((__m512i)high_halves(x[2], x[3]), shift - 16);
  return (PackedBytes)_mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packus_epi16(a, b));
}
template <int shift>
inline PackedBytes signed_bytes_from(const Bits (&x)[4]) {
  const auto bytes = [](Words w) { return (__m512i)selected(0x7f, w >> (shift - 16), w >> 8); };
  return (PackedBytes)_mm512_permutexvar_epi64(
      _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0),
      _mm512_packus_epi16(bytes(high_halves(x[0], x[1])), bytes(high_halves(x[2], x[3]))));
}
template <int shift>
inline void upper_halves(PackedBytes lower, uint8_t upper, Bits (&x)[4]) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i l = _mm512_permutexvar_epi32(order, (__m512i)lower), u = (__m512i)(PackedBytes{} + upper);
  const __m512i a = _mm512_slli_epi16(_mm512_unpacklo_epi8(l, u), shift);
  const __m512i b = _mm512_slli_epi16(_mm512_unpackhi_epi8(l, u), shift);
  x[0] = (Bits)_mm512_unpacklo_epi16(__m512i{}, a);
  x[1] = (Bits)_mm512_unpackhi_epi16(__m512i{}, a);
  x[2] = (Bits)_mm512_unpacklo_epi16(__m512i{}, b);
  x[3] = (Bits)_mm512_unpackhi_epi16(__m512i{}, b);
}
#elif defined(__AVX2__)
// Packing and unpacking work in halves of a vector, so one permutation puts the bytes in order.
template <int shift>
inline __m256i shifted(Bits a, Bits b) {
  return _mm256_packs_epi32(_mm256_srai_epi32((__m256i)a, shift), _mm256_srai_epi32((__m256i)b, shift));
}
inline PackedBytes in_order(__m256i x) {
  return (PackedBytes)_mm256_permutevar8x32_epi32(x, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
}
template <int shift>
inline PackedBytes bytes_from(const Bits (&x)[4]) {
  return in_order(_mm256_packus_epi16(shifted<shift>(x[0], x[1]), shifted<shift>(x[2], x[3])));
}
template <int shift>
inline PackedBytes signed_bytes_from(const Bits (&x)[4]) {
  const __m256i a = shifted<shift>(x[0], x[1]), b = shifted<shift>(x[2], x[3]), mask = _mm256_set1_epi16(0x7f);
  const __m256i bits = _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
  return in_order(_mm256_or_si256(bits, _mm256_packs_epi16(a, b)));  // negative numbers are packed to -128
}
template <int shift>
inline void upper_halves(PackedBytes lower, uint8_t upper, Bits (&x)[4]) {
  const __m256i order = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0), zero = _mm256_setzero_si256();
  const __m256i l = _mm256_permutevar8x32_epi32((__m256i)lower, order);
  const __m256i u = (__m256i)(PackedBytes{} + upper);
  const __m256i a = _mm256_slli_epi16(_mm256_unpacklo_epi8(l, u), shift);
  const __m256i b = _mm256_slli_epi16(_mm256_unpackhi_epi8(l, u), shift);
  x[0] = (Bits)_mm256_unpacklo_epi16(zero, a);
  x[1] = (Bits)_mm256_unpackhi_epi16(zero, a);
  x[2] = (Bits)_mm256_unpacklo_epi16(zero, b);
  x[3] = (Bits)_mm256_unpackhi_epi16(zero, b);
}
#elif defined(__x86_64__)
template <int shift>
inline __m128i shifted(Bits a, Bits b) {
  return _mm_packs_epi32(_mm_srai_epi32((__m128i)a, shift), _mm_srai_epi32((__m128i)b, shift));
}
template <int shift>
inline PackedBytes bytes_from(const Bits (&x)[4]) {
  return (PackedBytes)_mm_packus_epi16(shifted<shift>(x[0], x[1]), shifted<shift>(x[2], x[3]));
}
template <int shift>
inline PackedBytes signed_bytes_from(const Bits (&x)[4]) {
  const __m128i a = shifted<shift>(x[0], x[1]), b = shifted<shift>(x[2], x[3]), mask = _mm_set1_epi16(0x7f);
  const __m128i bits = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
  return (PackedBytes)_mm_or_si128(bits, _mm_packs_epi16(a, b));  // negative numbers are packed to -128
}
template <int shift>
inline void upper_halves(PackedBytes lower, uint8_t upper, Bits (&x)[4]) {
  const __m128i u = (__m128i)(PackedBytes{} + upper);
  const __m128i a = _mm_slli_epi16(_mm_unpacklo_epi8((__m128i)lower, u), shift);
  const __m128i b = _mm_slli_epi16(_mm_unpackhi_epi8((__m128i)lower, u), shift);
  x[0] = (Bits)_mm_unpacklo_epi16(_mm_setzero_si128(), a);
  x[1] = (Bits)_mm_unpackhi_epi16(_mm_setzero_si128(), a);
  x[2] = (Bits)_mm_unpacklo_epi16(_mm_setzero_si128(), b);
  x[3] = (Bits)_mm_unpackhi_epi16(_mm_setzero_si128(), b);
}
#else
template <int shift>
inline PackedBytes bytes_from(const Bits (&x)[4]) {
  const int16x8_t a = (int16x8_t)high_halves(x[0], x[1]), b = (int16x8_t)high_halves(x[2], x[3]);
  return (PackedBytes)vqshrun_high_n_s16(vqshrun_n_s16(a, shift - 16), b, shift - 16);
}
template <int shift>
inline PackedBytes signed_bytes_from(const Bits (&x)[4]) {
  const uint16x8_t a = (uint16x8_t)high_halves(x[0], x[1]), b = (uint16x8_t)high_halves(x[2], x[3]);
  const uint8x16_t bits = vshrn_high_n_u16(vshrn_n_u16(a, shift - 16), b, shift - 16);
  const uint8x16_t signs = vuzp2q_u8((uint8x16_t)a, (uint8x16_t)b);
  return (PackedBytes)vbslq_u8(vdupq_n_u8(0x7f), bits, signs);
}
template <int shift>
inline void upper_halves(PackedBytes lower, uint8_t upper, Bits (&x)[4]) {
  const uint8x16_t u = vdupq_n_u8(upper);
  const uint16x8_t zero = vdupq_n_u16(0);
  const uint16x8_t a = vshlq_n_u16((uint16x8_t)vzip1q_u8((uint8x16_t)lower, u), shift);
  const uint16x8_t b = vshlq_n_u16((uint16x8_t)vzip2q_u8((uint8x16_t)lower, u), shift);
  x[0] = (Bits)vzip1q_u16(zero, a);
  x[1] = (Bits)vzip2q_u16(zero, a);
  x[2] = (Bits)vzip1q_u16(zero, b);
  x[3] = (Bits)vzip2q_u16(zero, b);
}
#endif

// 0, 1, 2, ...
inline Bits lane_numbers() {
  Bits x;
  for (int k = 0; k < lanes; ++k) x[k] = static_cast<uint32_t>(k);
  return x;
}

}  // namespace
}  // namespace lucid::LUCID_LEVEL
