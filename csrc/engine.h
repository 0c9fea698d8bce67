// Runs a step: rows of any size and layout, cut into batches of a fixed number of elements, in place.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace lucid {

// The scalars of section 3 in float64, before they are rounded to a row's compute type.
struct HostScalars {
  double beta1, one_minus_beta1, beta2, one_minus_beta2, d, k, s, e, f;
};

// What one row's step was like.
struct RowObserved {
  double gradient = 0, update = 0, param = 0;  // sums of squares
  double ratio = 0;                            // the largest |m| / sqrt(w)

  void add(const RowObserved& part) {
    gradient += part.gradient;
    update += part.update;
    param += part.param;
    if (part.ratio > ratio || part.ratio != part.ratio) ratio = part.ratio;  // a NaN wins, and stays
  }
  template <class T>
  void add(const Observed<T>& slice) {
    RowObserved part{0, 0, 0, static_cast<double>(slice.ratio)};
    for (int lane = 0; lane < 16; ++lane) {
      part.gradient += static_cast<double>(slice.gradient[lane]);
      part.update += static_cast<double>(slice.update[lane]);
      part.param += static_cast<double>(slice.param[lane]);
    }
    add(part);
  }
};

// Which numbers the elements that are here have in the whole parameter, of which other processes may hold the rest:
// runs of consecutive ones, the first from `first` on, each next one `stride` further.
struct Numbering {
  int64_t first, run, stride;

  int64_t of(int64_t element) const {
    return element < run ? first + element : first + element / run * stride + element % run;
  }
  int64_t end_of_run(int64_t element) const { return element < run ? run : (element / run + 1) * run; }
};

// What is updated together: one parameter, its gradient and its state, as addresses.
struct Work {
  void* address[max_operands];
  int8_t size[shaped_operands];  // bytes of an element
  const Layout* layout;          // null where every operand is contiguous, the gradient in a type that the kernels read
  int64_t elements;
  int64_t row;                 // elements of one index of the first dimension
  const Numbering* numbering;  // null where that is the order in which they lie here
  Type compute, gradient;      // compute is float32 or float64
  ParamFormat param_format;
  MomentFormat moment_format;
  bool own_gradient;  // the gradient is of the parameter's own 16 bits
  bool amsgrad;
  int scalars;   // which of the table given to update()
  uint64_t key;  // of the draws
};

// What the draws of a step are keyed with.
uint64_t draw_key(int64_t stream, int64_t step);

// Elements of a batch, which one thread does in one go. Results do not depend on it; tests set it.
int64_t batch_elements();
void set_batch_elements(int64_t elements);

// Updates all of `works`; throws, where memory runs out, before anything is written. `serial`: one after the other on
// the calling thread, since some share memory. `observed`: one for each work, or null.
void update(const std::vector<const Work*>& works, const std::vector<HostScalars>& scalars, int threads, bool serial,
            std::vector<RowObserved>* observed);

// The sum of the squares of each work's gradient, in an order that nothing but its shape and strides decides.
std::vector<double> squares(const std::vector<const Work*>& works, int threads);

// The sum of n numbers in the order in which a chunk's squares are added, and the sums of chunks again; they are lost.
double ordered_sum(double* numbers, size_t n);

// The traffic of an fp32 update of n elements and no arithmetic to speak of: the memory's limit.
void move(int64_t n, float* a, const float* b, float* c, float* d, int threads);

}  // namespace lucid
