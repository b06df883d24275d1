// Loaded before the C library: an allocation of a thread of the CPU engine can fail. These allocations, and no others of
// the extension, are aligned to 64 bytes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>

static atomic_int left = -1;

// The allocation after so many others fails; negative: none does.
void fail_after(int others) { left = others; }

int is_pending(void) { return left >= 0; }

void* aligned_alloc(size_t alignment, size_t bytes) {
  void* (*next)(size_t, size_t) = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  if (alignment == 64 && left >= 0 && left-- == 0) return NULL;
  return next(alignment, bytes);
}
