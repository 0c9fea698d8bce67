#include "dispatch.h"

#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lucid {

#define LUCID_DECLARE_LEVEL(level) \
  namespace level {                \
  extern const Kernels kernels;    \
  }
#ifdef LUCID_HAS_baseline
LUCID_DECLARE_LEVEL(baseline)
#endif
#ifdef LUCID_HAS_v3
LUCID_DECLARE_LEVEL(v3)
#endif
#ifdef LUCID_HAS_v4
LUCID_DECLARE_LEVEL(v4)
#endif
#ifdef LUCID_HAS_neon
LUCID_DECLARE_LEVEL(neon)
#endif
#undef LUCID_DECLARE_LEVEL

namespace {

#if defined(__x86_64__)
// Returns 4 or 3 if this processor has x86-64-v4 or v3 (as the psABI lists them) and the system saves their registers,
// else 1. __builtin_cpu_supports() knows these names only in newer Clangs, and with clang-cl no library defines the
// function that it calls.
int x86_64_level() {
  constexpr uint32_t v3_basic = bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_CMPXCHG16B | bit_FMA |
                                bit_MOVBE | bit_AVX | bit_F16C | bit_OSXSAVE;
  constexpr uint32_t v3_extended = bit_BMI | bit_AVX2 | bit_BMI2;
  constexpr uint32_t v3_amd = bit_LAHF_LM | bit_LZCNT;
  constexpr uint32_t v4_extended = bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL;
  constexpr uint32_t avx_saved = 0x06, avx512_saved = 0xe6;

  uint32_t a, b, basic, d, extended, c, amd;
  if (!__get_cpuid(1, &a, &b, &basic, &d) || (basic & v3_basic) != v3_basic) return 1;
  if (!__get_cpuid_count(7, 0, &a, &extended, &c, &d) || (extended & v3_extended) != v3_extended) return 1;
  if (!__get_cpuid(0x80000001u, &a, &b, &amd, &d) || (amd & v3_amd) != v3_amd) return 1;
  uint32_t saved;
  asm("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  if ((saved & avx_saved) != avx_saved) return 1;
  return (extended & v4_extended) == v4_extended && (saved & avx512_saved) == avx512_saved ? 4 : 3;
}
#endif

struct Level {
  std::string name;
  const Kernels* kernels;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> available = [] {
    std::vector<Level> found;
#ifdef LUCID_HAS_baseline
    found.push_back({"baseline", &baseline::kernels});
#endif
#ifdef LUCID_HAS_v3
    if (x86_64_level() >= 3) found.push_back({"v3", &v3::kernels});
#endif
#ifdef LUCID_HAS_v4
    if (x86_64_level() >= 4) found.push_back({"v4", &v4::kernels});
#endif
#ifdef LUCID_HAS_neon
    found.push_back({"neon", &neon::kernels});
#endif
    return found;
  }();
  return available;
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> level = &levels().back();
  return level;
}

}  // namespace

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

const std::string& simd_level() { return chosen().load()->name; }

bool set_simd_level(const std::string& name) {
  for (const Level& level : levels()) {
    if (level.name == name) {
      chosen().store(&level);
      return true;
    }
  }
  return false;
}

const Kernels& kernels() { return *chosen().load()->kernels; }

}  // namespace lucid
