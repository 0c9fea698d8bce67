// The floating-point mode of the numerics contract: round to nearest, subnormals kept.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace lucid {

// The calling thread is in that mode while this lives.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() noexcept : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80u); }
  ~FloatMode() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
  FloatMode() noexcept {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
#error "lucid.optim's CPU engine knows the floating-point mode of x86-64 and arm64 only"
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace lucid
