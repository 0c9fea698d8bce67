// Which SIMD level runs: the best that this CPU has, or the one that a test asks for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lucid {

// Levels that this build has and this CPU can run, worst first.
std::vector<std::string> simd_levels();
const std::string& simd_level();
// False where `name` is not among simd_levels(); nothing is changed then.
bool set_simd_level(const std::string& name);

const Kernels& kernels();

}  // namespace lucid
