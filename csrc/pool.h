// A small pool of threads of our own, for where torch's team cannot be used: its workers can be replaced after a fork.
#pragma once

#include "parallel.h"

namespace lucid {

// parallel_for() in the pool. When another thread is using the pool, the caller does it all. The pool's own threads run
// in FloatMode; the caller's mode is the caller's business. `more`: another follows at once, so that the threads stay
// awake for it.
void share_in_pool(int threads, int64_t batches, BatchFn run, void* context, bool more);

// Wakes the threads that a share_in_pool within the next half millisecond will want.
void alert_pool(int threads);

}  // namespace lucid
