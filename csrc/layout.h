// The memory layout of a row. A row has several operands (parameter, gradient, moments) of one shape, each with its own
// strides. The walk visits the elements in the parameter's memory order, or in row-major order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace lucid {

struct Layout {
  // The dimensions in the order of the walk, outermost first. Dimensions that can be walked as one are merged.
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides[shaped_operands];  // in elements
  bool contiguous[shaped_operands] = {};          // element i of the walk lies at address i

  // `shape` and `strides`: those of the tensors, ndim each; null for an operand that the row does not have. Such an
  // operand counts as contiguous.
  static Layout of(int ndim, const int64_t* shape, const int64_t* const (&strides)[shaped_operands], bool row_major);
  bool all_contiguous() const;
};

// Calls f(position, offset, stride, count) for the runs of elements [begin, begin + n) of the walk:
// `count` elements, the first at `offset` from the operand's address, `stride` apart.
template <class F>
void for_each_run(const Layout& layout, int operand, int64_t begin, int64_t n, F&& f) {
  const std::size_t dims = layout.sizes.size();
  const std::vector<int64_t>& strides = layout.strides[operand];
  if (dims == 0) {
    if (n > 0) f(int64_t{0}, int64_t{0}, int64_t{0}, int64_t{1});
    return;
  }
  int64_t index[64];
  int64_t offset = 0;
  int64_t rest = begin;
  for (std::size_t k = dims; k-- > 0;) {
    index[k] = rest % layout.sizes[k];
    rest /= layout.sizes[k];
    offset += index[k] * strides[k];
  }
  const std::size_t last = dims - 1;
  for (int64_t position = 0; position < n;) {
    const int64_t left = layout.sizes[last] - index[last];
    const int64_t count = left < n - position ? left : n - position;
    f(position, offset, strides[last], count);
    position += count;
    index[last] += count;
    offset += count * strides[last];
    for (std::size_t k = last; k > 0 && index[k] == layout.sizes[k]; --k) {
      index[k] = 0;
      offset -= layout.sizes[k] * strides[k];
      ++index[k - 1];
      offset += strides[k - 1];
    }
  }
}

}  // namespace lucid
