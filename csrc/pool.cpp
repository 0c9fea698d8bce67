#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace lucid {

#if defined(__x86_64__)
FloatMode::FloatMode() noexcept : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80u); }
FloatMode::~FloatMode() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FloatMode::FloatMode() noexcept {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
}
FloatMode::~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
#error "lucid.optim's CPU engine knows the floating-point mode of x86-64 and arm64 only"
#endif

namespace {

class Pool {
 public:
  void share(int threads, int64_t batches, BatchFn run, void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      for (int64_t batch = 0; batch < batches; ++batch) run(context, batch);
      return;
    }
    const int helpers = hire(static_cast<int>(std::min<int64_t>(threads, batches)) - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      run_ = run;
      context_ = context;
      batches_ = batches;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers;
      working_ = helpers;
      ++job_;
    }
    if (helpers > 0) start_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  // Starts workers until there are `wanted`; how many there are, should the system refuse more.
  int hire(int wanted) {
    while (workers_ < wanted) {
      try {
        std::thread([this, worker = workers_, job = job_] { serve(worker, job); }).detach();
      } catch (const std::system_error&) {
        break;
      }
      ++workers_;
    }
    return std::min(workers_, wanted);
  }

  void serve(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (worker >= wanted_) continue;
      lock.unlock();
      {
        const FloatMode mode;
        work();
      }
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  void work() {
    for (int64_t batch; (batch = next_.fetch_add(1, std::memory_order_relaxed)) < batches_;) {
      run_(context_, batch);
    }
  }

  std::mutex turn_;   // who may use the pool
  std::mutex mutex_;  // guards all below but next_
  std::condition_variable start_, done_;
  BatchFn run_ = nullptr;
  void* context_ = nullptr;
  int64_t batches_ = 0;
  std::atomic<int64_t> next_ = 0;
  uint64_t job_ = 0;
  int workers_ = 0;  // touched under turn_ only
  int wanted_ = 0;
  int working_ = 0;
};

// Never destroyed: workers may outlive main's statics. A forked child has none of its parent's workers and
// perhaps a locked mutex, so it takes a new pool and forgets the old.
std::atomic<Pool*> pool = nullptr;

Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  static_cast<void>(registered);
  Pool* current = pool.load();
  if (current == nullptr) {
    auto* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) {
      current = fresh;
    } else {
      delete fresh;
    }
  }
  return *current;
}

}  // namespace

void parallel_for(int threads, int64_t batches, BatchFn run, void* context) {
  if (threads <= 1 || batches <= 1) {
    for (int64_t batch = 0; batch < batches; ++batch) run(context, batch);
  } else {
    the_pool().share(threads, batches, run, context);
  }
}

}  // namespace lucid
