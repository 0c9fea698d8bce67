// The team of OpenMP threads that torch's kernels run in. It is looked up when the program runs: nothing is linked.
#pragma once

#include <functional>
#include <string>

namespace lucid {

// Finds it. `torch_library`: the path of a loaded library that needs torch's OpenMP, by itself or by
// others; `torch_threads` is torch.get_num_threads; `inherited`: this process was forked and may have inherited a team
// whose threads it lacks.
void find_team(const std::string& torch_library, const std::function<int()>& torch_threads, bool inherited);

bool found_team();

// Why the calling thread may not use the team, or null if it may.
const char* team_refused();

// The library that it is of.
const std::string& team_library();

// How many threads a region of torch's on this thread asks for.
int team_threads();

// Calls run(context) on every thread of the team, the caller's among them, and waits for all. There may be fewer than
// team_threads().
void run_in_team(void (*run)(void*), void* context);

}  // namespace lucid
