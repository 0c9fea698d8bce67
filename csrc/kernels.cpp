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

// Calls part(Vectors<n>, i, count) for elements [begin, end): N vectors at a time, and at the end one, of which only
// `count` elements exist.
template <class T, int N, class Part>
[[gnu::always_inline]] inline void for_each_vector(int64_t begin, int64_t end, Part part) {
  int64_t i = begin;
  for (; i + N * width<T> <= end; i += N * width<T>) part(Vectors<N>{}, i, N * width<T>);
  for (; i < end; i += width<T>) part(Vectors<1>{}, i, least(end - i, width<T>));
}

// The first `count` elements; the others are set to zero.
[[gnu::always_inline]] inline Bits first_of(Bits x, int64_t count) {
  return count < lanes ? (lane_numbers() < static_cast<uint32_t>(count) ? x : Bits{}) : x;
}

// One step of the elements from index i on; their moments are given and returned in m and v. With `averaged`, they are
// the new moments already. `draws`: of the parameter.
template <class Param, class Gradient, bool amsgrad, bool averaged, class T, int N>
[[gnu::always_inline]] inline void step(const Scalars<T>& h, const Slice& s, int64_t i, int64_t count,
                                        Vector<T> (&m)[N], Vector<T> (&v)[N], Draws& draws) {
  Vector<T> theta[N], g[N], w[N] = {};
  Param::load(s, i, count, theta);
  Gradient::load(s, i, count, g);
  if constexpr (amsgrad) load_vectors(static_cast<const T*>(s.at[max_exp_avg_sq]) + i, count, w);
  if (s.observed == nullptr) [[likely]] {
    for (int n = 0; n < N; ++n) adamw<amsgrad, averaged>(h, theta[n], g[n], m[n], v[n], w[n]);
  } else {
    Used<Vector<T>> used[N];
    for (int n = 0; n < N; ++n) used[n] = adamw<amsgrad, averaged>(h, theta[n], g[n], m[n], v[n], w[n]);
    observe(*static_cast<Observed<T>*>(s.observed), count, theta, g, m, used);
  }
  if constexpr (amsgrad) store_vectors(static_cast<T*>(s.at[max_exp_avg_sq]) + i, count, w);
  Param::store(s, i, count, theta, draws);
}

// Averages the weights from index i on, as they are stored.
template <class Param, int N>
[[gnu::always_inline]] inline void average_vectors(const Scalars<typename Param::Compute>& h, const Slice& s, int64_t i,
                                                   int64_t count, Draws& draws) {
  using T = typename Param::Compute;
  T* const averages = static_cast<T*>(s.at[ema]) + i;
  Vector<T> a[N], theta[N];
  load_vectors(averages, count, a);
  Param::load(s, i, count, theta);
  Bits drawn[N];
  draws.next(drawn);
  for (int n = 0; n < N; ++n) a[n] = average_of_weights(h, a[n], theta[n], drawn[n]);
  store_vectors(averages, count, a);
}

template <class Param, class Gradient, class Moments, bool amsgrad, bool averages = false>
void update(const Scalars<typename Param::Compute>& scalars, const Slice& slice) noexcept {
  using T = typename Param::Compute;
  const Scalars<T> h = scalars;
  const Slice s = slice;
  for (int64_t begin = 0; begin < s.n;) {
    constexpr bool draws_any = Moments::draws || Param::draws || averages;
    const int64_t end = draws_any ? least(s.n, begin + Draws::reach(s.number + begin)) : s.n;
    Draws draws(s.key, s.number + begin);
    Draws param_draws = draws;
    if (Param::draws && s.drawn) param_draws = Draws(key_of(s.key, Use::param), s.number + begin);
    Draws average_draws(key_of(s.key, Use::ema), s.number + begin);
    const auto part = [&](auto vectors, int64_t i, int64_t count) __attribute__((always_inline)) {
      constexpr int N = decltype(vectors)::number;
      Vector<T> m[N], v[N];
      Moments::template load<exp_avg>(s, i, count, m);
      Moments::template load<exp_avg_sq>(s, i, count, v);
      step<Param, Gradient, amsgrad, false>(h, s, i, count, m, v, param_draws);
      Bits drawn[N] = {};
      if constexpr (Moments::draws) draws.next(drawn);
      Moments::template store<exp_avg>(s, i, count, m, drawn);
      Moments::template store<exp_avg_sq>(s, i, count, v, drawn);
      if constexpr (averages) average_vectors<Param, N>(h, s, i, count, average_draws);
    };
    for_each_vector<T, 2>(begin, end, part);
    begin = end;
  }
}

// Where draws part a block, a vector of `v` is read up to its width past the end, from the stack, and what is there is
// ignored. Room for it made steps up to 27 % slower, by other stack offsets, so only sanitizers have it.
#if defined(LUCID_SANITIZED)
constexpr int room = lanes;
#else
constexpr int room = 0;
#endif

// The new moments of a block, elements [begin, end), until they are encoded.
struct Block {
  int64_t begin, end;
  Few most;  // the bits of the largest magnitudes
  Scales scales;
  alignas(64) float m[block], v[block + room];
};

// The same for a block, four vectors at a time. With `usual`, a whole block is compiled for itself if vectors are wide.
template <bool usual, class Part>
[[gnu::always_inline]] inline void for_each_vector_of_block(int64_t begin, int64_t end, Part part) {
  if (!usual || lanes == 4 || end - begin < block) {
    for_each_vector<float, 4>(begin, end, part);
  } else {
    for (int64_t i = begin; i < begin + block; i += 8 * lanes) {
      part(Vectors<4>{}, i, 4 * lanes);
      part(Vectors<4>{}, i + 4 * lanes, 4 * lanes);
    }
  }
}

// Vectors of a longer array.
template <int N, class V>
inline V (&some_of(V* x)) [N] { return *reinterpret_cast<V(*)[N]>(x); }

// Decodes the moments of a block and averages them with the gradient.
template <bool usual, class Gradient>
[[gnu::always_inline]] inline void average_block(const Scalars<float>& h, const Slice& s, float m_scale, float v_scale,
                                                 Block& b) {
  // The processor does not prefetch the gradient by itself in time: -7 % from memory.
  constexpr int64_t ahead = 1024, line = 64;
  const char* const next = static_cast<const char*>(s.at[grad]) + (b.begin + ahead) * Gradient::bytes;
  for (int64_t at = 0; at < block * Gradient::bytes; at += line) __builtin_prefetch(next + at);

  Bits most_m = {}, most_v = {};
  const auto part = [&](auto vectors, int64_t i, int64_t count) __attribute__((always_inline)) {
    constexpr int N = decltype(vectors)::number;
    Float g[N], m[N], v[N];
    decode_signed(static_cast<const uint8_t*>(s.at[exp_avg]) + i, count, m_scale, m);
    decode_unsigned(static_cast<const uint8_t*>(s.at[exp_avg_sq]) + i, count, v_scale, v);
    constexpr int at_once = N == 1 ? 1 : 2;
    for (int n = 0; n < N; n += at_once) Gradient::load(s, i + n * lanes, count, some_of<at_once>(g + n));
    for (int n = 0; n < N; ++n) {
      average(h, g[n], m[n], v[n]);
      store_whole(b.m + i - b.begin + n * lanes, m[n]);
      store_whole(b.v + i - b.begin + n * lanes, v[n]);
      most_m = larger(most_m, bits_of(m[n]) & ~sign_bit);
      most_v = larger(most_v, first_of(bits_of(v[n]), N == 1 ? count : lanes));  // a negative v makes the scale NaN
    }
  };
  for_each_vector_of_block<usual>(b.begin, b.end, part);
  b.most = largest(most_m, most_v);
}

// Moves the parameters of a block and encodes its moments.
template <bool usual, class Param, class Gradient, bool amsgrad>
[[gnu::always_inline]] inline void move_block(const Scalars<float>& h, const Slice& s, const Block& b) {
  auto* const m_codes = static_cast<uint8_t*>(s.at[exp_avg]);
  auto* const v_codes = static_cast<uint8_t*>(s.at[exp_avg_sq]);
  for (int64_t begin = b.begin; begin < b.end;) {
    const int64_t end = least(b.end, begin + Draws::reach(s.number + begin));
    Draws draws(s.key, s.number + begin);
    Draws param_draws = draws;
    if (Param::draws && s.drawn) param_draws = Draws(key_of(s.key, Use::param), s.number + begin);
    const auto part = [&](auto vectors, int64_t i, int64_t count) __attribute__((always_inline)) {
      constexpr int N = decltype(vectors)::number;
      Float m[N], v[N];
      for (int n = 0; n < N; ++n) {
        m[n] = load_whole<Float>(b.m + i - b.begin + n * lanes);
        v[n] = load_whole<Float>(b.v + i - b.begin + n * lanes);
      }
      constexpr int at_once = N == 1 ? 1 : 2;
      for (int n = 0; n < N; n += at_once) {
        step<Param, Gradient, amsgrad, true>(h, s, i + n * lanes, count, some_of<at_once>(m + n),
                                             some_of<at_once>(v + n), param_draws);
      }
      Bits below[N];
      draws.next(below);
      for (int n = 0; n < N; ++n) below[n] = below_code(below[n]);
      encode_signed(m_codes + i, count, b.scales.inverse[0], m, below);
      encode_unsigned(v_codes + i, count, b.scales.inverse[1], v, below);
    };
    for_each_vector_of_block<usual>(begin, end, part);
    begin = end;
  }
  // A value that is not finite makes the whole block NaN; its codes mean nothing and are set to zero.
  const auto n = static_cast<size_t>(b.end - b.begin);
  if (b.scales.scale[0] != b.scales.scale[0]) memset(m_codes + b.begin, 0, n);
  if (b.scales.scale[1] != b.scales.scale[1]) memset(v_codes + b.begin, 0, n);
}

// Some blocks at a time, because a block waits long for its scale: two divisions after its last element.
template <bool usual, class Param, class Gradient, bool amsgrad>
[[gnu::always_inline]] inline void update_blocks(const Scalars<float>& h, const Slice& s) {
  auto* const m_scales = static_cast<float*>(s.at[exp_avg_scale]);
  auto* const v_scales = static_cast<float*>(s.at[exp_avg_sq_scale]);
  constexpr int at_once = 4;
  Block blocks[at_once];

  int64_t in_row = s.first % s.row;
  int64_t number = s.first / s.row * ((s.row + block - 1) / block) + in_row / block;  // of all the parameter's blocks
  for (int64_t end = 0; end < s.n;) {
    int count = 0;
    for (; count < at_once && end < s.n; ++count) {
      Block& b = blocks[count];
      b.begin = end;
      b.end = end += least(block, s.row - in_row);
      in_row = in_row + block < s.row ? in_row + block : 0;
      average_block<usual, Gradient>(h, s, m_scales[number + count], v_scales[number + count], b);
    }
    for (int n = 0; n < count; ++n, ++number) {
      blocks[n].scales = scales_of(blocks[n].most);
      m_scales[number] = blocks[n].scales.scale[0];
      v_scales[number] = blocks[n].scales.scale[1];
    }
    for (int n = 0; n < count; ++n) move_block<usual, Param, Gradient, amsgrad>(h, s, blocks[n]);
  }
}

template <class Param, class Gradient, bool amsgrad>
void update_eight_bit(const Scalars<float>& scalars, const Slice& slice) noexcept {
  Scalars<float> h = scalars;
  Slice s = slice;
  if (h.from_average1 && h.from_average2 && !h.cautious && s.observed == nullptr) {
    h.from_average1 = h.from_average2 = true;  // compiled again without these branches, which cost 10 %
    h.cautious = false;
    s.observed = nullptr;
    update_blocks<true, Param, Gradient, amsgrad>(h, s);
  } else {
    update_blocks<false, Param, Gradient, amsgrad>(h, s);
  }
}

template <class Param>
void average_slice(const Scalars<typename Param::Compute>& scalars, const Slice& slice) noexcept {
  using T = typename Param::Compute;
  const Scalars<T> h = scalars;
  const Slice s = slice;
  for (int64_t begin = 0; begin < s.n;) {
    const int64_t end = least(s.n, begin + Draws::reach(s.number + begin));
    Draws draws(key_of(s.key, Use::ema), s.number + begin);
    const auto part = [&](auto vectors, int64_t i, int64_t count) __attribute__((always_inline)) {
      average_vectors<Param, decltype(vectors)::number>(h, s, i, count, draws);
    };
    for_each_vector<T, 2>(begin, end, part);
    begin = end;
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
constexpr void set_both(Kernels& k, ParamFormat format) {
  auto& update_of = k.f32[static_cast<int>(format)];
  set<Param, PlainGradient<float>>(update_of, 0);
  set<Param, OwnGradient>(update_of, 1);
  k.average_f32[static_cast<int>(format)] = average_slice<Param>;
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
  set_both<PlainParam<float>, PlainGradient<float>>(k, ParamFormat::plain);
  set_both<Bfloat16Param, HalfGradient<Bfloat16>>(k, ParamFormat::bfloat16);
  set_both<Bfloat16ResidualParam, HalfGradient<Bfloat16>>(k, ParamFormat::bfloat16_residual);
  set_both<Bfloat16Param, HalfGradient<Bfloat16>>(k, ParamFormat::bfloat16_drawn);
  set_both<Float16Param, HalfGradient<Float16>>(k, ParamFormat::float16);
  set_both<Float16MasterParam, HalfGradient<Float16>>(k, ParamFormat::float16_master);
  k.f64[0] = update<PlainParam<double>, PlainGradient<double>, PlainMoments<double>, false>;
  k.f64[1] = update<PlainParam<double>, PlainGradient<double>, PlainMoments<double>, true>;
  k.f32_averaged = update<PlainParam<float>, PlainGradient<float>, PlainMoments<float>, false, true>;
  k.average_f64 = average_slice<PlainParam<double>>;
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
