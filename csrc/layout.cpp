#include "layout.h"

#include <algorithm>
#include <numeric>

namespace lucid {

Layout Layout::of(int ndim, const int64_t* shape, int operands, const int64_t* const* strides) {
  std::vector<int> order;
  for (int k = 0; k < ndim; ++k) {
    if (shape[k] != 1) order.push_back(k);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return strides[0][a] > strides[0][b]; });

  Layout layout;
  for (const int k : order) {
    bool merges = !layout.sizes.empty();
    for (int o = 0; o < operands && merges; ++o) {
      merges = layout.strides[o].back() == strides[o][k] * shape[k];
    }
    if (!merges) {
      layout.sizes.push_back(shape[k]);
      for (int o = 0; o < operands; ++o) layout.strides[o].push_back(strides[o][k]);
    } else {
      layout.sizes.back() *= shape[k];
      for (int o = 0; o < operands; ++o) layout.strides[o].back() = strides[o][k];
    }
  }
  for (int o = 0; o < operands; ++o) {
    int64_t dense = 1;
    layout.contiguous[o] = true;
    for (std::size_t k = layout.sizes.size(); k-- > 0;) {
      layout.contiguous[o] &= layout.strides[o][k] == dense;
      dense *= layout.sizes[k];
    }
  }
  return layout;
}

}  // namespace lucid
