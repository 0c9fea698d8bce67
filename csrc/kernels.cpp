#include "kernels.h"

#include "adamw.h"
#include "formats.h"
#include "observe.h"
#include "simd.h"
#include "squares.h"

namespace lucid::LUCID_LEVEL {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The number of vectors as a type, for a generic lambda.
template <int n>
struct Vectors {
  static constexpr int number = n;
};

// Calls part(Vectors<n>, i, count) for elements [begin, end): two vectors at a time, and at the end one, of which only
// `count` elements exist.
template <class T, class Part>
[[gnu::always_inline]] inline void for_each_vector(int64_t begin, int64_t end, Part part) {
  int64_t i = begin;
  for (; i + 2 * width<T> <= end; i += 2 * width<T>) part(Vectors<2>{}, i, 2 * width<T>);
  for (; i < end; i += width<T>) part(Vectors<1>{}, i, least(end - i, width<T>));
}

// The first `count` elements; the others are set to zero.
[[gnu::always_inline]] inline Bits first_of(Bits x, int64_t count) {
  return count < lanes ? (lane_numbers() < static_cast<uint32_t>(count) ? x : Bits{}) : x;
}

// One step of the elements from index i on; their moments are given and returned in m and v.
template <class Param, class Gradient, bool amsgrad, class T, int N>
[[gnu::always_inline]] inline void step(const Scalars<T>& h, const Slice& s, int64_t i, int64_t count,
                                        Vector<T> (&m)[N], Vector<T> (&v)[N]) {
  Vector<T> theta[N], g[N], w[N] = {};
  Param::load(s, i, count, theta);
  Gradient::load(s, i, count, g);
  if constexpr (amsgrad) load_vectors(static_cast<const T*>(s.at[max_exp_avg_sq]) + i, count, w);
  if (s.observed == nullptr) [[likely]] {
    for (int n = 0; n < N; ++n) adamw<amsgrad>(h, theta[n], g[n], m[n], v[n], w[n]);
  } else {
    Used<Vector<T>> used[N];
    for (int n = 0; n < N; ++n) used[n] = adamw<amsgrad>(h, theta[n], g[n], m[n], v[n], w[n]);
    observe(*static_cast<Observed<T>*>(s.observed), count, theta, g, m, used);
  }
  if constexpr (amsgrad) store_vectors(static_cast<T*>(s.at[max_exp_avg_sq]) + i, count, w);
  Param::store(s, i, count, theta);
}

template <class Param, class Gradient, class Moments, bool amsgrad>
void update(const Scalars<typename Param::Compute>& scalars, const Slice& slice) noexcept {
  using T = typename Param::Compute;
  const Scalars<T> h = scalars;
  const Slice s = slice;
  for (int64_t begin = 0; begin < s.n;) {
    const int64_t end = Moments::draws ? least(s.n, begin + Draws::reach(s.number + begin)) : s.n;
    Draws draws(s.key, s.number + begin);
    const auto part = [&](auto vectors, int64_t i, int64_t count) __attribute__((always_inline)) {
      constexpr int N = decltype(vectors)::number;
      Vector<T> m[N], v[N];
      Moments::template load<exp_avg>(s, i, count, m);
      Moments::template load<exp_avg_sq>(s, i, count, v);
      step<Param, Gradient, amsgrad>(h, s, i, count, m, v);
      Bits drawn[N] = {};
      if constexpr (Moments::draws) draws.next(drawn);
      Moments::template store<exp_avg>(s, i, count, m, drawn);
      Moments::template store<exp_avg_sq>(s, i, count, v, drawn);
    };
    for_each_vector<T>(begin, end, part);
    begin = end;
  }
}

// Encodes and stores n values of each moment; all of them use the same keys for random bits.
[[gnu::always_inline]] inline void encode(const float* ms, const float* vs, float inverse_m, float inverse_v,
                                          Draws draws, uint8_t* m_codes, uint8_t* v_codes, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    Bits drawn[4], m[4], v[4];
    draws.next(drawn);
    for (int k = 0; k < 4; ++k) {
      const Bits below = below_code(drawn[k]);
      m[k] = encoded_signed(load_whole<Float>(ms + i + k * lanes), inverse_m, below);
      v[k] = encoded_unsigned(load_whole<Float>(vs + i + k * lanes), inverse_v, below);
    }
    store_whole(m_codes + i, packed(signed_code(high_halves(m[0], m[1])), signed_code(high_halves(m[2], m[3]))));
    store_whole(v_codes + i, packed(unsigned_code(high_halves(v[0], v[1])), unsigned_code(high_halves(v[2], v[3]))));
  }
  for (; i < n; i += lanes) {
    const int64_t count = least(n - i, lanes);
    Bits drawn[1];
    draws.next(drawn);
    const Bits below = below_code(drawn[0]);
    const Bits m = encoded_signed(load<Float>(ms + i, count), inverse_m, below);
    const Bits v = encoded_unsigned(load<Float>(vs + i, count), inverse_v, below);
    store(m_codes + i, low_bytes(signed_code(m >> 16)), count);
    store(v_codes + i, low_bytes(unsigned_code(v >> 16)), count);
  }
}

template <class Param, class Gradient, bool amsgrad>
void update_eight_bit(const Scalars<float>& scalars, const Slice& slice) noexcept {
  const Scalars<float> h = scalars;
  const Slice s = slice;
  auto* const m_codes = static_cast<uint8_t*>(s.at[exp_avg]);
  auto* const v_codes = static_cast<uint8_t*>(s.at[exp_avg_sq]);
  auto* const m_scales = static_cast<float*>(s.at[exp_avg_scale]);
  auto* const v_scales = static_cast<float*>(s.at[exp_avg_sq_scale]);
  alignas(64) float ms[block], vs[block];

  int64_t in_row = s.first % s.row;
  int64_t number = s.first / s.row * ((s.row + block - 1) / block) + in_row / block;  // of all the parameter's blocks
  int64_t end;
  for (int64_t begin = 0; begin < s.n; begin = end, ++number) {
    end = begin + least(block, s.row - in_row);
    in_row = in_row + block < s.row ? in_row + block : 0;

    Bits most_m = {}, most_v = {};
    const float scale_m = m_scales[number], scale_v = v_scales[number];
    const auto part = [&](auto vectors, int64_t i, int64_t count) __attribute__((always_inline)) {
      constexpr int N = decltype(vectors)::number;
      Float m[N], v[N];
      for (int n = 0; n < N; ++n) {
        m[n] = decoded_signed(load<Bytes>(m_codes + i + n * lanes, least(count - n * lanes, lanes)), scale_m);
        v[n] = decoded_unsigned(load<Bytes>(v_codes + i + n * lanes, least(count - n * lanes, lanes)), scale_v);
      }
      step<Param, Gradient, amsgrad>(h, s, i, count, m, v);
      for (int n = 0; n < N; ++n) {
        store_whole(ms + i - begin + n * lanes, m[n]);
        store_whole(vs + i - begin + n * lanes, v[n]);
        most_m = larger(most_m, bits_of(m[n]) & ~sign_bit);
        most_v = larger(most_v, first_of(bits_of(v[n]), N == 1 ? count : lanes));  // a negative v makes the scale NaN
      }
    };
    for_each_vector<float>(begin, end, part);

    const Scale of_m = scale_of(largest(most_m), signed_largest);
    const Scale of_v = scale_of(largest(most_v), unsigned_largest);
    m_scales[number] = of_m.scale;
    v_scales[number] = of_v.scale;
    for (int64_t i = begin; i < end;) {
      const int64_t n = least(end - i, Draws::reach(s.number + i));
      const Draws draws(s.key, s.number + i);
      encode(ms + i - begin, vs + i - begin, of_m.inverse, of_v.inverse, draws, m_codes + i, v_codes + i, n);
      i += n;
    }
    // A value that is not finite makes the whole block NaN; its codes mean nothing and are set to zero.
    if (of_m.scale != of_m.scale) memset(m_codes + begin, 0, static_cast<size_t>(end - begin));
    if (of_v.scale != of_v.scale) memset(v_codes + begin, 0, static_cast<size_t>(end - begin));
  }
}

template <class From, class To>
void convert(const void* from, To* __restrict to, int64_t n) noexcept {
  const auto* __restrict source = static_cast<const From*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(source[i]);
}

template <class Half, class T>
void convert_halves(const void* from, T* to, int64_t n) noexcept {
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t count = least(n - i, lanes);
    Float x[1];
    Half::load(static_cast<const uint16_t*>(from) + i, count, x);
    if constexpr (sizeof(T) == sizeof(float)) {
      store(to + i, x[0], count);
    } else {
      for (int64_t k = 0; k < count; ++k) to[i + k] = static_cast<T>(x[0][k]);
    }
  }
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

template <int bins>
constexpr void add_squares_of(Kernels& k) {
  auto& squares_of = k.squares[bins - 2];
  squares_of[static_cast<int>(Type::float32)] = squares<PlainNumbers<float>, bins>;
  squares_of[static_cast<int>(Type::float64)] = squares<PlainNumbers<double>, bins>;
  squares_of[static_cast<int>(Type::float16)] = squares<HalfNumbers<Float16>, bins>;
  squares_of[static_cast<int>(Type::bfloat16)] = squares<HalfNumbers<Bfloat16>, bins>;
}

constexpr Kernels all_kernels() {
  Kernels k{};
  const auto in = [&](ParamFormat format) -> UpdateFn<float>(&)[moment_formats][2][2] {
    return k.f32[static_cast<int>(format)];
  };
  set_both<PlainParam<float>, PlainGradient<float>>(in(ParamFormat::plain));
  set_both<HalfParam<Bfloat16>, HalfGradient<Bfloat16>>(in(ParamFormat::bfloat16));
  set_both<Bfloat16ResidualParam, HalfGradient<Bfloat16>>(in(ParamFormat::bfloat16_residual));
  set_both<HalfParam<Float16>, HalfGradient<Float16>>(in(ParamFormat::float16));
  set_both<Float16MasterParam, HalfGradient<Float16>>(in(ParamFormat::float16_master));
  k.f64[0] = update<PlainParam<double>, PlainGradient<double>, PlainMoments<double>, false>;
  k.f64[1] = update<PlainParam<double>, PlainGradient<double>, PlainMoments<double>, true>;
  k.to_f32[static_cast<int>(Type::float32)] = convert<float, float>;
  k.to_f32[static_cast<int>(Type::float64)] = convert<double, float>;
  k.to_f32[static_cast<int>(Type::float16)] = convert_halves<Float16, float>;
  k.to_f32[static_cast<int>(Type::bfloat16)] = convert_halves<Bfloat16, float>;
  k.to_f64[static_cast<int>(Type::float32)] = convert<float, double>;
  k.to_f64[static_cast<int>(Type::float64)] = convert<double, double>;
  k.to_f64[static_cast<int>(Type::float16)] = convert_halves<Float16, double>;
  k.to_f64[static_cast<int>(Type::bfloat16)] = convert_halves<Bfloat16, double>;
  add_squares_of<2>(k);
  add_squares_of<3>(k);
  k.square_lanes = square_vectors * static_cast<int>(width<double>);
  k.move = move;
  return k;
}

}  // namespace

extern const Kernels kernels;
constexpr Kernels kernels = all_kernels();

}  // namespace lucid::LUCID_LEVEL
