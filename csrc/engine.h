// Updates rows of any size and layout in place, in batches of a fixed number of elements.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace lucid {

// The scalars of section 3 in float64, before they are rounded to a row's compute type.
struct HostScalars {
  double beta1, one_minus_beta1, beta2, one_minus_beta2, d, k, s, e, f, cautious, ema, one_minus_ema;
};

// The observation of one row.
struct RowObserved {
  double gradient = 0, update = 0, param = 0;  // sums of squares
  double ratio = 0;                            // the largest |m| / sqrt(w)

  void add(const RowObserved& part) {
    gradient += part.gradient;
    update += part.update;
    param += part.param;
    if (part.ratio > ratio || part.ratio != part.ratio) ratio = part.ratio;  // a NaN wins and stays
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

// The numbers of the local elements in the whole parameter, of which other processes may hold the rest. They form runs
// of `run` consecutive numbers; the first run begins at `first`, each next one `stride` further.
struct Numbering {
  int64_t first, run, stride;

  int64_t of(int64_t element) const {
    return element < run ? first + element : first + element / run * stride + element % run;
  }
  int64_t end_of_run(int64_t element) const { return element < run ? run : (element / run + 1) * run; }
};

// One row, as addresses: a parameter, its gradient and its state.
struct Work {
  void* address[max_operands];
  int8_t size[shaped_operands];  // bytes of an element
  const Layout* layout;          // null if all operands are contiguous and the kernels can read the gradient's type
  int64_t elements;
  int64_t row;                 // elements with the same index of the first dimension
  const Numbering* numbering;  // null if the numbers are 0, 1, 2, ...
  Type compute, gradient;      // compute is float32 or float64
  ParamFormat param_format;
  MomentFormat moment_format;
  bool own_gradient;  // the gradient has the parameter's type
  bool amsgrad;
  bool draws;    // something is stochastically rounded, so elements are numbered in row-major order
  int scalars;   // the set in the table that update() gets
  uint64_t key;  // of this step's random bits
};

// The key of a parameter's random bits at a step.
uint64_t draw_key(int64_t stream, int64_t step);

// The elements of a batch, which one thread processes at a time. Results do not depend on it; tests set it.
int64_t batch_elements();
void set_batch_elements(int64_t elements);

// Updates all of `works`. If memory runs out, it throws before it writes anything. `serial`: some rows share memory, so
// update them one after the other on the calling thread. `observed`: one for each work, or null.
void update(const std::vector<const Work*>& works, const std::vector<HostScalars>& scalars, int threads, bool serial,
            std::vector<RowObserved>* observed);

// The words of the exact sum of the squares of all gradients (exact_sum.h), with carries moved up: those of works of
// kind 0, of kind 1, and so on. `kinds`: that of each work, or empty if all are of kind 0. `scale`: GradScaler's.
std::vector<int64_t> squares(const std::vector<const Work*>& works, const std::vector<int>& kinds, int number_of_kinds,
                             double scale, int threads);

// The memory traffic of an fp32 update of n elements with hardly any arithmetic, to measure memory bandwidth.
void move(int64_t n, float* a, const float* b, float* c, float* d, int threads);

}  // namespace lucid
