// Runs a step: rows of any size and layout, cut into batches of a fixed number of elements, in place.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace lucid {

enum Operand : int { param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq };

// The scalars of section 3 in float64, before they are rounded to a row's compute type.
struct HostScalars {
  double beta1, one_minus_beta1, beta2, one_minus_beta2, d, k, s, e;
  bool maximize;
};

// What is updated together: one parameter, its gradient and its state, as addresses.
struct Work {
  void* address[max_operands];
  const Layout* layout;  // null where every operand is contiguous and the gradient of the compute type
  int64_t elements;
  Type compute, gradient;  // compute is float32 or float64: the type of all operands but the gradient
  bool amsgrad;
  int scalars;  // which of the table given to update()
};

// Elements of a batch, which one thread does in one go. Results do not depend on it; tests set it.
int64_t batch_elements();
void set_batch_elements(int64_t elements);

// Updates all of `works`; throws, where memory runs out, before anything is written. `serial`: one after the other on
// the calling thread, since some share memory.
void update(const std::vector<Work>& works, const std::vector<HostScalars>& scalars, int threads, bool serial);

// The traffic of an fp32 update of n elements and no arithmetic to speak of: the memory's limit.
void move(int64_t n, float* a, const float* b, float* c, float* d, int threads);

}  // namespace lucid
