#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "float_mode.h"
#include "pool.h"
#include "team.h"

namespace lucid {
namespace {

const std::string torchs = "torch", pools = "pool";
std::atomic<const std::string*> preferred = &torchs;

std::atomic<int> own_threads = 0, thread_budget = std::numeric_limits<int>::max();

int within_budget(int threads) { return threads == own_threads ? std::min(threads, thread_budget.load()) : threads; }

// Why not torch's team, or null.
const char* refused(int threads) {
  if (preferred.load() != &torchs) return "it was asked for";
  const char* why = team_refused();
  // A team of another size would cost torch's next kernel its threads: libgomp ends them and makes new ones.
  if (why == nullptr && team_threads() != threads) why = "torch runs another number of threads";
  return why;
}

// Batches that the team's threads take until none is left; the threads may be fewer than asked for.
struct Shared {
  int64_t batches;
  BatchFn run;
  void* context;
  int most;  // of the threads that take batches
  std::atomic<int> threads = 0;
  std::atomic<int64_t> next = 0;

  void work() {
    if (threads.fetch_add(1, std::memory_order_relaxed) >= most) return;
    const FloatMode mode;
    for (int64_t batch; (batch = next.fetch_add(1, std::memory_order_relaxed)) < batches;) run(context, batch);
  }
};

}  // namespace

void parallel_for(int threads, int64_t batches, BatchFn run, void* context, bool more) {
  const int most = within_budget(threads);
  if (most <= 1 || batches <= 1) {
    for (int64_t batch = 0; batch < batches; ++batch) run(context, batch);
  } else if (refused(threads) != nullptr) {
    share_in_pool(most, batches, run, context, more);
  } else {
    Shared shared{batches, run, context, most};
    run_in_team([](void* all) { static_cast<Shared*>(all)->work(); }, &shared);
  }
}

void expect_work(int threads) {
  const int most = within_budget(threads);
  if (most > 1 && refused(threads) != nullptr) alert_pool(most);
}

void set_thread_budget(int own, int budget) {
  own_threads = own;
  thread_budget = budget;
}

std::vector<std::string> teams() { return found_team() ? std::vector{pools, torchs} : std::vector{pools}; }

std::pair<std::string, std::string> team() {
  const char* why = preferred.load() != &torchs ? "it was asked for" : team_refused();
  return why == nullptr ? std::pair{torchs, team_library()} : std::pair{pools, std::string(why)};
}

const std::string& preferred_team() { return *preferred.load(); }

bool set_preferred_team(const std::string& name) {
  if (name == pools) {
    preferred = &pools;
  } else if (name == torchs) {
    preferred = &torchs;
  } else {
    return false;
  }
  return true;
}

}  // namespace lucid
