// Who runs a step's batches: torch's team of OpenMP threads (team.h) or our pool (pool.h).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace lucid {

using BatchFn = void (*)(void* context, int64_t batch) noexcept;

// Calls run(context, batch) for every batch in [0, batches), on at most `threads` threads, the caller's among them;
// returns when all are done. Every thread is in FloatMode. `more`: another call follows at once.
void parallel_for(int threads, int64_t batches, BatchFn run, void* context, bool more = false);

// Wakes the threads that a parallel_for within the next half millisecond will want.
void expect_work(int threads);

// No more than `budget` threads run batches where torch runs `own` threads, the number that it chose by itself.
void set_thread_budget(int own, int budget);

// "torch" or "pool": those that this process has, the ones to prefer last.
std::vector<std::string> teams();
// The one that runs the calling thread's next large step, and why.
std::pair<std::string, std::string> team();
// The preferred one, which a thread uses where it may; false where `name` is not among teams().
const std::string& preferred_team();
bool set_preferred_team(const std::string& name);

}  // namespace lucid
