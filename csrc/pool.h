// A small pool of threads of our own: libgomp's would hang a forked child at its first parallel region.
#pragma once

#include <cstdint>

namespace lucid {

using BatchFn = void (*)(void* context, int64_t batch) noexcept;

// Calls run(context, batch) for every batch in [0, batches), on at most `threads` threads, the caller's among
// them; returns when all are done. When another thread is using the pool, the caller does it all. The pool's
// own threads run in FloatMode; the caller's mode is the caller's business. `more`: another follows at once, so
// that the threads stay awake for it.
void parallel_for(int threads, int64_t batches, BatchFn run, void* context, bool more = false);

// Wakes the threads that a parallel_for within the next half millisecond will want.
void expect_work(int threads);

// The floating-point mode of the numerics contract (round to nearest, subnormals kept) while it lives.
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
