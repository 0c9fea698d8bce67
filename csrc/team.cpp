#include "team.h"

// Sanitizers do not see how OpenMP's threads wait for each other. Windows has no dlsym.
#if !defined(_WIN32) && !defined(LUCID_SANITIZED)
#define LUCID_MAY_FIND_TEAM
#include <dlfcn.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#else
#include <pthread.h>
#endif
#endif

namespace lucid {
namespace {

// What GCC's libgomp and LLVM's and Intel's libomp have in common.
struct OpenMP {
  void (*parallel)(void (*run)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  void (*set_threads)(int) = nullptr;
  std::string library;
};

OpenMP openmp;
long process = 0;  // that found it
const char* const forked = "this process was forked, and its parent's OpenMP threads are not in it";
const char* missing = "nobody has looked for torch's OpenMP threads";

#ifdef LUCID_MAY_FIND_TEAM
long process_id() { return getpid(); }

bool is_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#else
  return pthread_main_np() == 1;
#endif
}

// The functions that `handle` shows, all of one library; `parallel` is null where it does not show them.
OpenMP openmp_of(void* handle) {
  void* const parallel = dlsym(handle, "GOMP_parallel");
  void* const max_threads = dlsym(handle, "omp_get_max_threads");
  void* const set_threads = dlsym(handle, "omp_set_num_threads");
  Dl_info first, second, third;
  if (parallel == nullptr || max_threads == nullptr || set_threads == nullptr || dladdr(parallel, &first) == 0 ||
      dladdr(max_threads, &second) == 0 || dladdr(set_threads, &third) == 0 || first.dli_fbase != second.dli_fbase ||
      first.dli_fbase != third.dli_fbase) {
    return {};
  }
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(parallel);
  found.max_threads = reinterpret_cast<decltype(found.max_threads)>(max_threads);
  found.set_threads = reinterpret_cast<decltype(found.set_threads)>(set_threads);
  found.library = first.dli_fname;
  return found;
}

// Whether torch runs in it: the number that is set there is the one that torch tells. It is a number of the calling
// thread's, so no other thread notices.
bool is_torchs(const OpenMP& library, const std::function<int()>& torch_threads) {
  const int before = torch_threads();
  if (library.max_threads() != before) return false;
  const int other = before > 1 ? before - 1 : 2;
  library.set_threads(other);
  const bool follows = torch_threads() == other;
  library.set_threads(before);
  return follows;
}
#else
long process_id() { return 0; }
bool is_main_thread() { return false; }
#endif

}  // namespace

void find_team([[maybe_unused]] const std::string& torch_library,
               [[maybe_unused]] const std::function<int()>& torch_threads, [[maybe_unused]] bool inherited) {
#if defined(LUCID_MAY_FIND_TEAM)
  openmp = {};
  process = process_id();
  if (inherited) {
    missing = forked;
    return;
  }
  missing = "no OpenMP library was found that torch's number of threads follows";
  // What torch was bound to: by the program and its preloaded libraries or, if they have none, by torch's own.
  void* const torchs = dlopen(torch_library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  for (void* handle : {RTLD_DEFAULT, torchs == nullptr ? RTLD_DEFAULT : torchs}) {
    OpenMP found = openmp_of(handle);
    if (found.parallel != nullptr && is_torchs(found, torch_threads)) {
      openmp = found;
      return;
    }
  }
#elif defined(_WIN32)
  missing = "torch's OpenMP threads are not used on Windows";
#else
  missing = "this is a build for sanitizers, which do not see how OpenMP's threads wait for each other";
#endif
}

bool found_team() { return openmp.parallel != nullptr; }

const char* team_refused() {
  if (openmp.parallel == nullptr) return missing;
  // The child of a fork has the caller's team without its threads: libgomp would wait for them forever.
  if (process_id() != process) return forked;
  // Each thread has a team of its own, made in its first region, and spinning teams slow each other down. Of other
  // threads nobody knows whether they have one.
  static thread_local const bool main_thread = is_main_thread();
  return main_thread ? nullptr : "this is not the main thread, whose OpenMP threads it would compete with";
}

const std::string& team_library() { return openmp.library; }

int team_threads() { return openmp.max_threads(); }

void run_in_team(void (*run)(void*), void* context) { openmp.parallel(run, context, 0, 0); }

}  // namespace lucid
