#include "kernels.h"

#include <math.h>
#include <string.h>

namespace lucid::LUCID_LEVEL {
namespace {

inline float square_root(float x) { return sqrtf(x); }
inline double square_root(double x) { return sqrt(x); }

}  // namespace
}  // namespace lucid::LUCID_LEVEL

#include "adamw.h"

namespace lucid::LUCID_LEVEL {
namespace {

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct Float32 {
  using Stored = float;
  static float value(float x) { return x; }
};

struct Float64 {
  using Stored = double;
  static double value(double x) { return x; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static float value(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
};

// In integers, since GCC 12 does not vectorise a loop over _Float16. A subnormal half is normal in float32:
// its value is its significand times 2^-24.
struct Float16 {
  using Stored = uint16_t;
  static float value(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + 0x38000000u;
    const uint32_t special = (magnitude << 13) + 0x70000000u;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    uint32_t subnormal_bits;
    memcpy(&subnormal_bits, &subnormal, sizeof subnormal_bits);
    const uint32_t finite = magnitude < 0x0400u ? subnormal_bits : normal;
    return float_of_bits(sign | (magnitude >= 0x7c00u ? special : finite));
  }
};

template <class Source, class T>
void convert(const void* from, T* __restrict to, int64_t n) noexcept {
  const auto* __restrict source = static_cast<const typename Source::Stored*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(Source::value(source[i]));
}

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  return {{adamw<T, false>, adamw<T, true>},
          {convert<Float32, T>, convert<Float64, T>, convert<Float16, T>, convert<Bfloat16, T>}};
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

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {typed_kernels<float>(), typed_kernels<double>(), move};

}  // namespace lucid::LUCID_LEVEL
