// A small thread pool. We do not use libgomp, because a forked child would hang in its first parallel region.
#pragma once

#include <cstdint>

namespace lucid {

using BatchFn = void (*)(void* context, int64_t batch) noexcept;

// Calls run(context, batch) for every batch in [0, batches), on at most `threads` threads including the caller's, and
// returns when all are done. If another thread is using the pool, the caller runs all batches. The threads of the pool
// run in FloatMode; the caller sets its own mode. `more`: another call follows at once, so the threads stay awake.
void parallel_for(int threads, int64_t batches, BatchFn run, void* context, bool more = false);

// Wakes the threads for a parallel_for that comes within half a millisecond.
void expect_work(int threads);

// While an object exists, its thread has the floating-point mode of the numerics contract: round to nearest, subnormals
// kept.
class FloatMode {
 public:
  FloatMode() noexcept;
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace lucid
