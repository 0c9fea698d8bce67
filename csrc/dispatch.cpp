#include "dispatch.h"

#include <atomic>

namespace lucid {

#define LUCID_DECLARE_LEVEL(level) \
  namespace level {                \
  extern const Kernels kernels;    \
  }
#ifdef LUCID_HAS_v3
LUCID_DECLARE_LEVEL(v3)
#endif
#ifdef LUCID_HAS_v4
LUCID_DECLARE_LEVEL(v4)
#endif
LUCID_DECLARE_LEVEL(baseline)
#undef LUCID_DECLARE_LEVEL

namespace {

struct Level {
  std::string name;
  const Kernels* kernels;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> available = [] {
    std::vector<Level> found = {{"baseline", &baseline::kernels}};
#ifdef LUCID_HAS_v3
    if (__builtin_cpu_supports("x86-64-v3")) found.push_back({"v3", &v3::kernels});
#endif
#ifdef LUCID_HAS_v4
    if (__builtin_cpu_supports("x86-64-v4")) found.push_back({"v4", &v4::kernels});
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
