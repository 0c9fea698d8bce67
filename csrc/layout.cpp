#include "layout.h"

#include <algorithm>
#include <numeric>

namespace lucid {

Layout Layout::of(int ndim, const int64_t* shape, const int64_t* const (&strides)[shaped_operands], bool row_major) {
  std::vector<int> order;
  for (int k = 0; k < ndim; ++k) {
    if (shape[k] != 1) order.push_back(k);
  }
  if (!row_major) {
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return strides[param][a] != strides[param][b] ? strides[param][a] > strides[param][b] : a < b;
    });
  }

  Layout layout;
  for (const int k : order) {
    bool merges = !layout.sizes.empty();
    for (int o = 0; o < shaped_operands && merges; ++o) {
      merges = strides[o] == nullptr || layout.strides[o].back() == strides[o][k] * shape[k];
    }
    if (!merges) {
      layout.sizes.push_back(shape[k]);
      for (int o = 0; o < shaped_operands; ++o) {
        if (strides[o] != nullptr) layout.strides[o].push_back(strides[o][k]);
      }
    } else {
      layout.sizes.back() *= shape[k];
      for (int o = 0; o < shaped_operands; ++o) {
        if (strides[o] != nullptr) layout.strides[o].back() = strides[o][k];
      }
    }
  }
  for (int o = 0; o < shaped_operands; ++o) {
    int64_t dense = 1;
    layout.contiguous[o] = true;
    if (strides[o] == nullptr) continue;
    for (std::size_t k = layout.sizes.size(); k-- > 0;) {
      layout.contiguous[o] &= layout.strides[o][k] == dense;
      dense *= layout.sizes[k];
    }
  }
  return layout;
}

bool Layout::all_contiguous() const {
  return std::all_of(contiguous, contiguous + shaped_operands, [](bool c) { return c; });
}

}  // namespace lucid
