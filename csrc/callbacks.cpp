#include "callbacks.h"

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace lucid {
namespace {

bool (*has_callbacks)() = nullptr;

}  // namespace

void find_callbacks([[maybe_unused]] const std::string& torch_library) {
#ifndef _WIN32
  void* const torch = dlopen(torch_library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return;
  // bool at::hasCallbacks(), of ATen/record_function.h
  has_callbacks = reinterpret_cast<bool (*)()>(dlsym(torch, "_ZN2at12hasCallbacksEv"));
#endif
}

bool recorded() { return has_callbacks == nullptr || has_callbacks(); }

}  // namespace lucid
