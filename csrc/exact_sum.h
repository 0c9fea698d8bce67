// The exact sum of squares, the same for any order and any division of the elements, as src/lucid/engine/exact_sum.py
// describes it.
//
// To add each square to the words takes some nanoseconds. So most are added in lanes of float64 first, which lose
// nothing as long as all squares lie in one window. The window has an exponent `a`, and a lane has two or three bins:
//
//   bin 0 begins at 2^(a + 52) and stays below 2^(a + 53), so its last bit is 2^a. Adding a square x to it rounds x to
//   a multiple q of 2^a. x - q, at most 2^(a - 1) in size, is exact and goes to bin 1. bin 1 begins at 1.5 * 2^(a + 7).
//   After `most_rounds` < 128 additions it is less than 2^(a + 6) away from there, so it stays between 2^(a + 7) and
//   2^(a + 8), and its last bit is 2^(a - 45). If every square is a multiple of that, bin 1 is exact. If not, what was
//   rounded away, at most 2^(a - 46) in size, is exact and goes to bin 2. bin 2 is the same another 45 bits lower: its
//   last bit is 2^(a - 90).
//
// So the sum is exact if bin 0 has not left its range, which it only leaves upwards, and if every square is a multiple
// of the last bin's last bit, which is so if |g| is large enough for its type. The kernel tells whether both held. If
// not, the elements are added again: with three bins, in another window, or, if few are too small for it, those one by
// one. The bits of a bin, less those with which it began, are what was added, as an integer in units of its last bit.
// So lanes are added to the words in integers.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace lucid {

constexpr int sum_words = 67, word_bits = 32, lowest_exponent = -1074;
// The words after the sum that count elements; three more are not of the engine.
enum SumCount : int { nan_count = sum_words, infinite_count, large_count, total_words = sum_words + 6 };

// Moves carries up, so that each word of the sum is below 2^32.
void carry(int64_t* words);

class ExactSum {
 public:
  static constexpr int no_window = INT32_MIN;
  static constexpr int64_t most_elements = 1 << 28;  // so that no word overflows

  // `scale`: that of all gradients. `window`: the exponent of a window that may fit.
  ExactSum(double scale, int window);

  // Adds the squares of n numbers that a step computes in type `compute`; at most `most_elements` before move_to().
  void add(Type type, Type compute, const void* from, int64_t n);
  // Adds the sum to `words`, with carries moved up, and begins again.
  void move_to(std::atomic<int64_t>* words);
  int window() const { return exponent_; }

 private:
  bool try_window(Type type, double large, const void* from, int64_t n);
  bool try_bins(int bins, Type type, const void* from, int64_t n);
  void add_carefully(Type type, double large, const void* from, int64_t n);
  template <class T>
  void settle(double large, T* values, int64_t n);
  void set_window(int exponent);
  void fold();
  template <class T>
  void add_alone(const T* values, int64_t n, double large);
  void deposit(int64_t value, int exponent);

  const Kernels& kernels_;
  const double scale_;
  int exponent_ = no_window;    // of the window
  double end_ = 0;              // of bin 0: 2^(exponent + 53)
  SquareWindow windows_[2][4];  // by the number of bins - 2, and Type
  SquareLanes begin_;
  SquareLanes lanes_[2];                // what was added, and room for the next attempt
  const SquareLanes* added_ = &begin_;  // what was added
  int bins_ = 2;                        // of what was added
  bool too_small_ = false;              // whether some elements needed the third bin
  int wide_ = 0;                        // how many more attempts take three bins at once
  int64_t rounds_ = 0;                  // additions to each lane, at most
  int64_t words_[total_words] = {};
};

}  // namespace lucid
