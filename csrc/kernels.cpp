#include "kernels.h"

#include "adamw.h"
#include "formats.h"
#include "simd.h"

namespace lucid::LUCID_LEVEL {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls part(i, count) for the vectors of elements [begin, end).
template <class T, class Part>
[[gnu::always_inline]] inline void for_each_vector(int64_t begin, int64_t end, Part part) {
  int64_t i = begin;
  for (; i + width<T> <= end; i += width<T>) part(i, width<T>);
  if (i < end) part(i, end - i);
}

template <class Param, class Gradient, class Moments, bool amsgrad>
void update(const Scalars<typename Param::Compute>& scalars, const Slice& slice) noexcept {
  using T = typename Param::Compute;
  const Scalars<T> h = scalars;
  const Slice s = slice;
  for (int64_t begin = 0; begin < s.n;) {
    const int64_t end = Moments::draws ? least(s.n, begin + Draws::reach(s.first + begin)) : s.n;
    Draws draws(s.key, s.first + begin);
    for_each_vector<T>(begin, end, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      Vector<T> theta = Param::load(s, i, count);
      Vector<T> m = Moments::template load<exp_avg>(s, i, count);
      Vector<T> v = Moments::template load<exp_avg_sq>(s, i, count);
      Vector<T> w = {};
      if constexpr (amsgrad) w = load<Vector<T>>(static_cast<const T*>(s.at[max_exp_avg_sq]) + i, count);
      adamw<amsgrad>(h, theta, Gradient::load(s, i, count), m, v, w);
      if constexpr (amsgrad) store(static_cast<T*>(s.at[max_exp_avg_sq]) + i, w, count);
      const Bits drawn = Moments::draws ? draws.next() : Bits{};
      Moments::template store<exp_avg>(s, i, count, m, drawn);
      Moments::template store<exp_avg_sq>(s, i, count, v, drawn);
      Param::store(s, i, count, theta);
    });
    begin = end;
  }
}

// A few blocks at a time, so that the wait for one's scale is filled with another's work.
constexpr int blocks_at_once = 4;

template <class Param, class Gradient, bool amsgrad>
void update_eight_bit(const Scalars<float>& scalars, const Slice& slice) noexcept {
  struct Block {
    int64_t begin, end;  // elements of the slice
    int64_t number;      // among all blocks of the parameter
    Scale m, v;
  };
  const Scalars<float> h = scalars;
  const Slice s = slice;
  auto* const m_codes = static_cast<uint8_t*>(s.at[exp_avg]);
  auto* const v_codes = static_cast<uint8_t*>(s.at[exp_avg_sq]);
  auto* const m_scales = static_cast<float*>(s.at[exp_avg_scale]);
  auto* const v_scales = static_cast<float*>(s.at[exp_avg_sq_scale]);
  alignas(64) float ms[blocks_at_once][block], vs[blocks_at_once][block];

  int64_t number = s.first / s.row * ((s.row + block - 1) / block) + s.first % s.row / block;
  int64_t in_row = s.first % s.row;
  for (int64_t next = 0; next < s.n;) {
    Block blocks[blocks_at_once];
    int found = 0;
    for (; found < blocks_at_once && next < s.n; ++found) {
      Block& b = blocks[found];
      b.begin = next;
      b.end = next + least(block, s.row - in_row);
      b.number = number++;
      in_row = in_row + block < s.row ? in_row + block : 0;
      next = b.end;

      Bits most_m = {}, most_v = {};
      const float scale_m = m_scales[b.number], scale_v = v_scales[b.number];
      for_each_vector<float>(b.begin, b.end, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        Float theta = Param::load(s, i, count);
        Float m = decoded_signed(load<Bytes>(m_codes + i, count), scale_m);
        Float v = decoded_unsigned(load<Bytes>(v_codes + i, count), scale_v);
        Float w = {};
        if constexpr (amsgrad) w = load<Float>(static_cast<const float*>(s.at[max_exp_avg_sq]) + i, count);
        adamw<amsgrad>(h, theta, Gradient::load(s, i, count), m, v, w);
        if constexpr (amsgrad) store(static_cast<float*>(s.at[max_exp_avg_sq]) + i, w, count);
        Param::store(s, i, count, theta);
        store(&ms[found][i - b.begin], m, lanes);
        store(&vs[found][i - b.begin], v, lanes);
        most_m = larger(most_m, bits_of(m) & ~sign_bit);
        most_v = larger(most_v, bits_of(v) & ~sign_bit);
      });
      b.m = scale_of(largest(most_m), signed_largest);
      b.v = scale_of(largest(most_v), unsigned_largest);
    }
    for (int k = 0; k < found; ++k) {
      const Block& b = blocks[k];
      m_scales[b.number] = b.m.scale;
      v_scales[b.number] = b.v.scale;
      for (int64_t begin = b.begin; begin < b.end;) {
        const int64_t end = least(b.end, begin + Draws::reach(s.first + begin));
        Draws draws(s.key, s.first + begin);
        for_each_vector<float>(begin, end, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
          const Bits below = below_code(draws.next());
          const Float m = load<Float>(&ms[k][i - b.begin], count);
          const Float v = load<Float>(&vs[k][i - b.begin], count);
          store(m_codes + i, encoded_signed(m, b.m.inverse, below), count);
          store(v_codes + i, encoded_unsigned(v, b.v.inverse, below), count);
        });
        begin = end;
      }
      // What was not finite makes the whole block NaN: codes of it mean nothing.
      if (b.m.scale != b.m.scale) memset(m_codes + b.begin, 0, static_cast<size_t>(b.end - b.begin));
      if (b.v.scale != b.v.scale) memset(v_codes + b.begin, 0, static_cast<size_t>(b.end - b.begin));
    }
  }
}

template <class From, class To>
void convert(const void* from, To* __restrict to, int64_t n) noexcept {
  const auto* __restrict source = static_cast<const From*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(source[i]);
}

template <Float float_of_half(Halves), class T>
void convert_halves(const void* from, T* to, int64_t n) noexcept {
  for_each_vector<float>(0, n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float x = float_of_half(load<Halves>(static_cast<const uint16_t*>(from) + i, count));
    if constexpr (sizeof(T) == sizeof(float)) {
      store(to + i, x, count);
    } else {
      for (int64_t k = 0; k < count; ++k) to[i + k] = static_cast<T>(x[k]);
    }
  });
}

void move(int64_t n, float* __restrict a, const float* __restrict b, float* __restrict c,
          float* __restrict d) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    const float sum = a[i] + b[i];
    a[i] = sum;
    c[i] += sum;
    d[i] += sum;
  }
}

template <class Param, class Gradient>
constexpr void set(UpdateFn<float> (&update_of)[moment_formats][2][2], int own_gradient) {
  const auto in = [&](MomentFormat format) -> UpdateFn<float>(&)[2] {
    return update_of[static_cast<int>(format)][own_gradient];
  };
  in(MomentFormat::plain)[0] = update<Param, Gradient, PlainMoments<float>, false>;
  in(MomentFormat::plain)[1] = update<Param, Gradient, PlainMoments<float>, true>;
  in(MomentFormat::bfloat16)[0] = update<Param, Gradient, Bfloat16Moments, false>;
  in(MomentFormat::bfloat16)[1] = update<Param, Gradient, Bfloat16Moments, true>;
  in(MomentFormat::eight_bit)[0] = update_eight_bit<Param, Gradient, false>;
  in(MomentFormat::eight_bit)[1] = update_eight_bit<Param, Gradient, true>;
}

template <class Param, class OwnGradient>
constexpr void set_both(UpdateFn<float> (&update_of)[moment_formats][2][2]) {
  set<Param, PlainGradient<float>>(update_of, 0);
  set<Param, OwnGradient>(update_of, 1);
}

constexpr Kernels all_kernels() {
  Kernels k{};
  const auto in = [&](ParamFormat format) -> UpdateFn<float>(&)[moment_formats][2][2] {
    return k.f32[static_cast<int>(format)];
  };
  set_both<PlainParam<float>, PlainGradient<float>>(in(ParamFormat::plain));
  set_both<Bfloat16Param, HalfGradient<float_of_bfloat16>>(in(ParamFormat::bfloat16));
  set_both<Bfloat16ResidualParam, HalfGradient<float_of_bfloat16>>(in(ParamFormat::bfloat16_residual));
  set_both<Float16Param, HalfGradient<float_of_float16>>(in(ParamFormat::float16));
  set_both<Float16MasterParam, HalfGradient<float_of_float16>>(in(ParamFormat::float16_master));
  k.f64[0] = update<PlainParam<double>, PlainGradient<double>, PlainMoments<double>, false>;
  k.f64[1] = update<PlainParam<double>, PlainGradient<double>, PlainMoments<double>, true>;
  k.to_f32[static_cast<int>(Type::float32)] = convert<float, float>;
  k.to_f32[static_cast<int>(Type::float64)] = convert<double, float>;
  k.to_f32[static_cast<int>(Type::float16)] = convert_halves<float_of_float16, float>;
  k.to_f32[static_cast<int>(Type::bfloat16)] = convert_halves<float_of_bfloat16, float>;
  k.to_f64[static_cast<int>(Type::float32)] = convert<float, double>;
  k.to_f64[static_cast<int>(Type::float64)] = convert<double, double>;
  k.to_f64[static_cast<int>(Type::float16)] = convert_halves<float_of_float16, double>;
  k.to_f64[static_cast<int>(Type::bfloat16)] = convert_halves<float_of_bfloat16, double>;
  k.move = move;
  return k;
}

}  // namespace

extern const Kernels kernels;
constexpr Kernels kernels = all_kernels();

}  // namespace lucid::LUCID_LEVEL
