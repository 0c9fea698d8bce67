// Chooses the SIMD level: the best that this CPU has, or the one that a test asks for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lucid {

// The levels that this build contains and this CPU can run, the widest last.
std::vector<std::string> simd_levels();
const std::string& simd_level();
// Returns false and changes nothing if `name` is not one of simd_levels().
bool set_simd_level(const std::string& name);

const Kernels& kernels();

}  // namespace lucid
