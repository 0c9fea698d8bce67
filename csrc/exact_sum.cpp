#include "exact_sum.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "dispatch.h"

namespace lucid {
namespace {

constexpr int64_t most_rounds = 124;  // additions to a lane
constexpr int bits_of_bin = 45;       // between the last bits of two bins
constexpr int lowest_window = lowest_exponent + 2 * bits_of_bin, highest_window = 1023 - 53;
constexpr int usual_window = -43;       // of gradients around 1
constexpr int64_t careful = 512;        // elements that are looked at if they do not fit the window
constexpr int attempts_with_three = 8;  // after one with two bins did not fit

// The square of a number g with 2^e <= |g| < 2^(e + 1) is a multiple of 2^(2 e - below), and of 2^lowest.
struct LastBit {
  int below, lowest;
};
constexpr LastBit last_bits[] = {{46, -298}, {52, lowest_exponent}, {20, -48}, {14, -266}};  // by Type
constexpr int64_t bytes_of[] = {4, 8, 2, 2};                                                 // by Type

double power(int exponent) { return std::bit_cast<double>(int64_t{exponent + 1023} << 52); }
int64_t bits_of(double x) { return std::bit_cast<int64_t>(x); }

// An exponent e such that the squares of all |g| >= 2^e are multiples of 2^last; `lowest_exponent` if all are.
int least_exponent(Type type, int last) {
  const LastBit& bit = last_bits[static_cast<int>(type)];
  return last <= bit.lowest ? lowest_exponent : (last + bit.below + 1) >> 1;
}

// 2^e for that e, as an integer in the type that the kernel computes in, less 1.
int64_t least_below(Type type, int last) {
  const int least = least_exponent(type, last);
  if (least == lowest_exponent) return 0;
  if (type == Type::float64) return (int64_t{least + 1023} << 52) - 1;
  return (int64_t{std::min(least, 128) + 127} << 23) - 1;
}

}  // namespace

void carry(int64_t* words) {
  for (int k = 0; k + 1 < sum_words; ++k) {
    words[k + 1] += words[k] >> word_bits;
    words[k] &= 0xffffffff;
  }
}

ExactSum::ExactSum(double scale, int window) : kernels_(kernels()), scale_(scale) {
  if (window != no_window) set_window(window);
}

// Adds `value` * 2^exponent: less than 2^33 to a word.
void ExactSum::deposit(int64_t value, int exponent) {
  const int shift = exponent - lowest_exponent;
  int64_t* const word = words_ + shift / word_bits;
  const int bits = shift % word_bits;
  const uint64_t lower = (static_cast<uint64_t>(value) & 0xffffffff) << bits;
  const int64_t upper = (value >> word_bits) * (int64_t{1} << bits);
  word[0] += static_cast<int64_t>(lower & 0xffffffff);
  word[1] += static_cast<int64_t>(lower >> word_bits) + (upper & 0xffffffff);
  word[2] += upper >> word_bits;
}

// Adds and counts numbers one by one.
template <class T>
void ExactSum::add_alone(const T* values, int64_t n, double large) {
  for (int64_t i = 0; i < n; ++i) {
    const auto g = static_cast<double>(values[i]);
    const double square = g * g;
    words_[nan_count] += g != g;
    words_[infinite_count] += square == std::numeric_limits<double>::infinity();
    words_[large_count] += std::abs(g) >= large && std::isfinite(g);
    if (!std::isfinite(square)) continue;
    const auto exponent = static_cast<int>(bits_of(square) >> 52);
    const int64_t significand = (bits_of(square) & ((int64_t{1} << 52) - 1)) | (int64_t{exponent > 0} << 52);
    deposit(significand, std::max(exponent, 1) - 1 + lowest_exponent);
  }
}

void ExactSum::set_window(int exponent) {
  exponent_ = exponent;
  wide_ = 0;
  end_ = power(exponent + 53);
  const double most = end_ - power(exponent);
  for (const Type type : {Type::float32, Type::float64, Type::float16, Type::bfloat16}) {
    for (int more = 0; more < 2; ++more) {
      const int last = exponent - (1 + more) * bits_of_bin;
      windows_[more][static_cast<int>(type)] = {most, least_below(type, last)};
    }
  }
  std::fill_n(begin_.bin[0], max_square_lanes, power(exponent + 52));
  std::fill_n(begin_.bin[1], max_square_lanes, 1.5 * power(exponent + 7));
  std::fill_n(begin_.bin[2], max_square_lanes, 1.5 * power(exponent + 7 - bits_of_bin));
}

// Adds the lanes to the words and begins them again, in a lower window if elements were too small for two bins in this.
void ExactSum::fold() {
  if (rounds_ == 0) return;
  const int lanes = kernels_.square_lanes;
  int64_t first = 0;
  for (int bin = 0; bin < bins_; ++bin) {
    int64_t sum = 0;
    for (int k = 0; k < lanes; ++k) sum += bits_of(added_->bin[bin][k]) - bits_of(begin_.bin[bin][k]);
    if (bin == 0) first = sum;
    deposit(sum, exponent_ - bin * bits_of_bin);
  }
  // What a lane would hold after `most_rounds`: best are 48 bits of the 52 that it can, so that some may hold more.
  const auto held = static_cast<int>(std::bit_width(static_cast<uint64_t>(first / (lanes * rounds_) * most_rounds)));
  rounds_ = 0;
  added_ = &begin_;
  if (too_small_ && held > 0 && held < 32) set_window(std::max(exponent_ - (48 - held), lowest_window));
  too_small_ = false;
}

// Adds n numbers with so many bins if they fit the window.
bool ExactSum::try_bins(int bins, Type type, const void* from, int64_t n) {
  const int64_t rounds = (n + kernels_.square_lanes - 1) / kernels_.square_lanes;
  if (bins != bins_ || rounds_ + rounds > most_rounds) fold();
  const auto which = static_cast<int>(type);
  SquareLanes& after = lanes_[added_ == lanes_];
  if (!kernels_.squares[bins - 2][which](from, n, windows_[bins - 2][which], *added_, after)) return false;
  bins_ = bins;
  added_ = &after;
  rounds_ += rounds;
  return true;
}

// Adds n numbers if they fit the window. Numbers from `large` on must not fit.
bool ExactSum::try_window(Type type, double large, const void* from, int64_t n) {
  if (exponent_ == no_window || large * large < end_) return false;
  if (wide_ == 0) {
    if (try_bins(2, type, from, n)) return true;
    wide_ = attempts_with_three;
  }
  if (large * large < end_ || !try_bins(3, type, from, n)) return false;
  too_small_ |= wide_-- == attempts_with_three;
  return true;
}

// Adds at most `careful` numbers, which it may change, in a window that is right for most of them.
template <class T>
void ExactSum::settle(double large, T* values, int64_t n) {
  constexpr Type type = sizeof(T) == sizeof(float) ? Type::float32 : Type::float64;
  constexpr int64_t parts = 8;
  double most[parts] = {}, sums[parts] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double size = std::abs(static_cast<double>(values[i]));
    sums[i % parts] += size * size;
    most[i % parts] = size > most[i % parts] ? size : most[i % parts];
  }
  double sum = 0;
  for (const double part : sums) sum += part;
  const double largest = *std::max_element(most, most + parts);
  // So that a lane can hold the sum of four times `careful` such numbers.
  int wanted = largest > 0 ? lowest_window : usual_window;
  if (sum > 0) wanted = std::max(std::ilogb(sum / static_cast<double>(n)) + 12 - 52, lowest_window);
  if (!std::isfinite(sum) || largest >= large || wanted > highest_window) {
    add_alone(values, n, large);
    return;
  }
  if (exponent_ == no_window || wanted > exponent_ || wanted + 8 < exponent_) {
    fold();
    set_window(wanted);
  }
  const double least = std::ldexp(1.0, least_exponent(type, exponent_ - 2 * bits_of_bin));
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] == 0 || std::abs(static_cast<double>(values[i])) >= least) continue;
    add_alone(values + i, 1, large);
    values[i] = 0;
  }
  if (try_window(type, large, values, n)) return;
  fold();
  if (!try_window(type, large, values, n)) add_alone(values, n, large);
}

// The same for numbers of any type, some of which do not fit the window.
void ExactSum::add_carefully(Type type, double large, const void* from, int64_t n) {
  const auto which = static_cast<int>(type);
  for (int64_t i = 0; i < n; i += careful) {
    const int64_t count = std::min(careful, n - i);
    const char* at = static_cast<const char*>(from) + i * bytes_of[which];
    if (n > careful && try_window(type, large, at, count)) continue;
    if (type == Type::float64) {
      alignas(64) double values[careful];
      kernels_.to_f64[which](at, values, count);
      settle(large, values, count);
    } else {
      alignas(64) float values[careful];
      kernels_.to_f32[which](at, values, count);
      settle(large, values, count);
    }
  }
}

void ExactSum::add(Type type, Type compute, const void* from, int64_t n) {
  const double large = (compute == Type::float64 ? 0x1p512 : 0x1p64) * scale_;
  for (int64_t i = 0, count; i < n; i += count) {
    if (rounds_ == most_rounds) fold();
    count = std::min(n - i, exponent_ == no_window ? 64 : (most_rounds - rounds_) * kernels_.square_lanes);
    const void* at = static_cast<const char*>(from) + i * bytes_of[static_cast<int>(type)];
    if (!try_window(type, large, at, count)) add_carefully(type, large, at, count);
  }
}

void ExactSum::move_to(std::atomic<int64_t>* words) {
  fold();
  carry(words_);
  for (int k = 0; k < total_words; ++k) {
    if (words_[k] != 0) words[k].fetch_add(words_[k], std::memory_order_relaxed);
    words_[k] = 0;
  }
}

}  // namespace lucid
