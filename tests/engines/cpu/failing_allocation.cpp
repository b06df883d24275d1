// Loaded before the C library: an allocation of a thread of the CPU engine can fail. These allocations, and no others
// of the extension, are aligned to 64 bytes.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>

namespace {
std::atomic<int> left{-1};
}

// The allocation after so many others fails; negative: none does.
extern "C" void fail_after(int others) { left = others; }

extern "C" int is_pending() { return left >= 0; }

extern "C" void* aligned_alloc(size_t alignment, size_t bytes) {
  using Function = void* (*)(size_t, size_t);
  static const Function next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "aligned_alloc"));
  if (alignment == 64 && left >= 0 && left-- == 0) return nullptr;
  return next(alignment, bytes);
}
