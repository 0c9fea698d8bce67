// Whether anything records what torch runs: a profiler, an execution trace, somebody's own callbacks.
#pragma once

#include <string>

namespace lucid {

// Looks up torch's own answer, when the program runs: nothing is linked. `torch_library`: the path of a loaded library
// that needs libtorch, by itself or by others.
void find_callbacks(const std::string& torch_library);

// Whether something records the calling thread; true if torch was not found to answer.
bool recorded();

}  // namespace lucid
