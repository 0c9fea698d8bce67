#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "float_mode.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace lucid {

namespace {

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#else
  asm volatile("yield");
#endif
}

// Waits actively for a condition that will hold soon: to put a thread to sleep and wake it takes longer (50 us and more
// on a virtual machine). It yields the core to other threads, and gives up after half a millisecond.
template <class Condition>
void spin_until(const Condition& holds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(500);
  while (!holds() && std::chrono::steady_clock::now() < end) {
    for (int i = 0; i < 16 && !holds(); ++i) pause_briefly();
    std::this_thread::yield();
  }
}

class Pool {
 public:
  void share(int threads, int64_t batches, BatchFn run, void* context, bool more) {
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
      more_ = more;
      job_.fetch_add(1, std::memory_order_release);
    }
    if (helpers > 0) start_.notify_all();
    work();
    spin_until([this] { return working_.load(std::memory_order_acquire) == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
  }

  void alert(int threads) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || hire(threads - 1) == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++alert_;
    }
    start_.notify_all();
  }

 private:
  // Starts workers until there are `wanted`. Returns how many there are, at most `wanted`: the system may refuse more.
  int hire(int wanted) {
    while (workers_ < wanted) {
      try {
        std::thread([this, worker = workers_, job = job_.load()] { serve(worker, job); }).detach();
      } catch (const std::exception&) {
        break;
      }
      ++workers_;
    }
    return std::min(workers_, wanted);
  }

  void serve(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    uint64_t alerted = 0;
    for (;;) {
      start_.wait(lock, [&] { return job_ != seen || alert_ != alerted; });
      alerted = alert_;
      if (job_ == seen) {
        lock.unlock();
        spin_until([&] { return job_.load(std::memory_order_acquire) != seen; });
        lock.lock();
        continue;
      }
      seen = job_;
      if (worker >= wanted_) continue;
      lock.unlock();
      {
        const FloatMode mode;
        work();
      }
      lock.lock();
      const bool more = more_;
      if (--working_ == 0) done_.notify_one();
      if (more) {
        lock.unlock();
        spin_until([&] { return job_.load(std::memory_order_acquire) != seen; });
        lock.lock();
      }
    }
  }

  void work() {
    for (int64_t batch; (batch = next_.fetch_add(1, std::memory_order_relaxed)) < batches_;) {
      run_(context_, batch);
    }
  }

  std::mutex turn_;   // held by the thread that uses the pool
  std::mutex mutex_;  // guards everything below except next_
  std::condition_variable start_, done_;
  BatchFn run_ = nullptr;
  void* context_ = nullptr;
  int64_t batches_ = 0;
  bool more_ = false;
  std::atomic<int64_t> next_ = 0;
  std::atomic<uint64_t> job_ = 0;  // this and working_ change under mutex_, and are also read without it to spin
  uint64_t alert_ = 0;
  int workers_ = 0;  // used under turn_ only
  int wanted_ = 0;
  std::atomic<int> working_ = 0;
};

// It is never destroyed, because workers may outlive main's statics. A forked child has none of its parent's workers,
// and perhaps a locked mutex, so it takes a new pool and does not touch the old one.
std::atomic<Pool*> pool = nullptr;

Pool& the_pool() {
#if !defined(_WIN32)  // Windows has no fork
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  static_cast<void>(registered);
#endif
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

void alert_pool(int threads) { the_pool().alert(threads); }

void share_in_pool(int threads, int64_t batches, BatchFn run, void* context, bool more) {
  the_pool().share(threads, batches, run, context, more);
}

}  // namespace lucid
